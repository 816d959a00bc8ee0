"""Export a student to formats for serving: ONNX, a torch.export program, a transformers folder."""

from __future__ import annotations

import io
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from softcache.data.rows import TOKEN
from softcache.errors import ModelError, SettingsError
from softcache.models.hf import build_hf, save_hub
from softcache.models.hub import HubModel
from softcache.models.language import TokenModel
from softcache.models.spec import parse_model
from softcache.models.tokens import Tokenize
from softcache.train.run_folder import Run, open_run
from softcache.util.extras import import_extra
from softcache.util.files import replace_file

TOLERANCE = 1e-4  # relative to the largest logit

BATCH_SIZES = (1, 2, 7)  # that an exported file is checked with

Infer = Callable[[Tensor], Tensor]


def export_student(
    folder: Path,
    *,
    onnx: bool,
    pt2: bool,
    hf: bool = False,
    student: Sequence[str] = (),
    trust_code: bool = False,
) -> list[Path]:
    """Export the student of a run; each file is run and compared with the student before it is kept.

    ONNX and pt2 files take inputs (B, *shape) float32, images in [0, 1], and return logits (B, C), for
    any B. The folder of --hf loads in transformers, with preprocessing and class names.

    Args:
        folder: the run folder of `softcache train`.
        onnx: write RUN/student.onnx.
        pt2: write RUN/student.pt2.
        hf: write RUN/student-hf.
        student: specifications of students whose code is the user's own, with the path to their file.
        trust_code: load a student in a .pt2 file even if the file may run code.

    Returns:
        The paths that were written.

    Raises:
        SettingsError: no format is requested, the student does not have this format, or the onnx extra is
            not installed.
        ModelError: the student cannot be exported, or the exported file returns other logits.
    """
    if not (onnx or pt2 or hf):
        raise SettingsError("no format to export to; give --onnx, --pt2 or --hf")
    run = open_run(folder, trust_code=trust_code)
    model = run.model(student)
    if isinstance(model, HubModel) and isinstance(model.prepare, Tokenize) and (onnx or pt2):
        raise SettingsError(
            f"{folder} is a student of texts, and ONNX and pt2 do not include its tokenizer; use --hf"
        )
    if isinstance(model, TokenModel) and (onnx or pt2):
        raise SettingsError(
            f"{folder} is a student of tokens, which generates or labels texts with transformers; use --hf"
        )
    written = []
    for requested, name, export in (
        (onnx, "student.onnx", _export_onnx),
        (pt2, "student.pt2", _export_pt2),
    ):
        if requested:
            path = folder / name

            def write(unfinished: Path, export: Callable[..., Infer] = export) -> None:
                infer = export(model, run.example(2), unfinished)
                check_exported(
                    infer, model, [run.example(batch) for batch in BATCH_SIZES], unfinished.name
                )

            replace_file(path, write)
            written.append(path)
    if hf:
        written.append(_export_hf(run, model, folder / "student-hf"))
    return written


def _export_hf(run: Run, model: nn.Module, folder: Path) -> Path:
    if not isinstance(model, HubModel | TokenModel) or not hasattr(model.model, "save_pretrained"):
        raise SettingsError(
            f"{run.folder} does not hold a student of kind hf:, which --hf needs; give --onnx or --pt2"
        )
    names = tuple(run.facts["class_names"])
    with tempfile.TemporaryDirectory(dir=run.folder) as unfinished:
        new_folder = Path(unfinished) / folder.name
        save_hub(model, new_folder, names if len(names) == run.classes else ())
        examples = [run.example(batch) for batch in BATCH_SIZES]
        spec = replace(parse_model(f"hf:{new_folder}"), task=run.unit, teacher=True)
        width = run.classes if run.unit == TOKEN else None
        exported = build_hf(spec, (), width).eval()
        check_exported(exported, model, examples, folder.name)
        if folder.exists():
            shutil.rmtree(folder)
        new_folder.rename(folder)
    return folder


def check_exported(infer: Infer, model: nn.Module, examples: Sequence[Tensor], name: str) -> None:
    """Check that an exported model returns the student's logits.

    Args:
        infer: the exported model.
        model: the student.
        examples: batches (B, *shape) of several sizes B.
        name: how to call the exported model in messages.

    Raises:
        ModelError: the logits have another shape, or differ by more than TOLERANCE.
    """
    for inputs in examples:
        with torch.inference_mode():
            expected, logits = model(inputs), infer(inputs)  # (B, C)
        if logits.shape != expected.shape:
            raise ModelError(
                f"{name} returns shape {tuple(logits.shape)} for a batch of {len(inputs)}; expected "
                f"{tuple(expected.shape)}, as the student returns: its code must not fix the batch size"
            )
        difference, scale = float((logits - expected).abs().max()), float(expected.abs().max())
        if not difference <= TOLERANCE * max(1.0, scale):
            raise ModelError(
                f"{name}: logits differ by up to {difference:.2g} from the student's, which reach "
                f"{scale:.2g}; its code probably branches on values, which cannot be exported"
            )


def _export_onnx(model: nn.Module, example: Tensor, path: Path) -> Infer:
    import_extra("onnxscript", extra="onnx", what="--onnx")
    runtime = import_extra("onnxruntime", extra="onnx", what="--onnx")
    # the exporter warns about its own internals, on which the user cannot act
    with _explained("ONNX"), warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            model,
            (example,),
            path,
            dynamo=True,
            input_names=["inputs"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
    session = runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(session.run(None, {"inputs": inputs.numpy()})[0])


def _export_pt2(model: nn.Module, example: Tensor, path: Path) -> Infer:
    with _explained("a torch.export program"), warnings.catch_warnings(action="ignore"):
        program = torch.export.export(
            model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        buffer = io.BytesIO()  # on a full disk, torch would end the process
        torch.export.save(program, buffer)
        buffer.seek(0)
        loaded = torch.export.load(buffer).module()
    path.write_bytes(buffer.getvalue())
    return lambda inputs: loaded(inputs).detach()


class _explained:  # lower case, since it reads like a function in a with statement
    """Turns any exception that torch raises during an export into a ModelError of one line."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            message = " ".join(str(error).split())[:300]
            raise ModelError(
                f"the student cannot be exported as {self.what}: {type(error).__name__}: {message}"
            ) from error
