"""A student in the formats in which models are served: ONNX, and an exported program of torch."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from softcache.errors import ModelError, SettingsError
from softcache.models.hf import Tokenize, build_hf, save_hub
from softcache.models.hub import HubModel
from softcache.models.spec import parse_model
from softcache.train.run_folder import Run, open_run
from softcache.util.extras import import_extra
from softcache.util.files import replace_file

TOLERANCE = 1e-4  # of the largest logit

TRIED = (1, 2, 7)  # samples in a batch

Infer = Callable[[Tensor], Tensor]


def export_student(
    folder: Path, *, onnx: bool, pt2: bool, hf: bool = False, student: Sequence[str] = ()
) -> list[Path]:
    """Write RUN/student.onnx, .pt2 or RUN/student-hf; each is run and compared with the student first.

    The files take (B, *shape) float32, images in [0, 1], and give (B, C) logits, for any B. The folder
    is one that transformers loads, with preprocessing and the names of the classes.

    Args:
        student: where its code is, if it is not a built-in one.

    Raises:
        SettingsError: no format is named, or the extra softcache[onnx] is not there.
        ModelError: the student cannot be exported, or what came out gives other logits.
    """
    if not (onnx or pt2 or hf):
        raise SettingsError("no format; say --onnx, --pt2 or --hf")
    run = open_run(folder)
    model = run.model(student)
    if isinstance(model, HubModel) and isinstance(model.prepare, Tokenize) and (onnx or pt2):
        raise SettingsError(
            f"{folder} is a student of texts, whose tokenizer is no part of ONNX or pt2; use --hf"
        )
    written = []
    for wanted, name, write in ((onnx, "student.onnx", _to_onnx), (pt2, "student.pt2", _to_pt2)):
        if wanted:
            path = folder / name

            def make(unfinished: Path, write: Callable[..., Infer] = write) -> None:
                infer = write(model, run.example(2), unfinished)
                check_exported(
                    infer, model, [run.example(batch) for batch in TRIED], unfinished.name
                )

            replace_file(path, make)
            written.append(path)
    if hf:
        written.append(_to_hf(run, model, folder / "student-hf"))
    return written


def _to_hf(run: Run, model: nn.Module, folder: Path) -> Path:
    if not isinstance(model, HubModel):
        raise SettingsError(
            f"{run.folder} is no student of hf:, which --hf writes; say --onnx or --pt2"
        )
    names = tuple(run.facts["class_names"])
    with tempfile.TemporaryDirectory(dir=run.folder) as unfinished:
        place = Path(unfinished) / folder.name
        save_hub(model, place, names if len(names) == run.classes else ())
        examples = [run.example(batch) for batch in TRIED]
        check_exported(
            build_hf(parse_model(f"hf:{place}"), (), None).eval(), model, examples, folder.name
        )
        if folder.exists():
            shutil.rmtree(folder)
        place.rename(folder)
    return folder


def check_exported(infer: Infer, model: nn.Module, examples: Sequence[Tensor], name: str) -> None:
    """Raise ModelError unless `infer` gives the model's logits for batches (B, *shape) of several sizes."""
    for inputs in examples:
        with torch.inference_mode():
            wanted, found = model(inputs), infer(inputs)
        if found.shape != wanted.shape:
            raise ModelError(
                f"{name} gives {tuple(found.shape)} for a batch of {len(inputs)}, the student "
                f"{tuple(wanted.shape)}; the batch's size must not stand in its code"
            )
        worst, scale = float((found - wanted).abs().max()), float(wanted.abs().max())
        if not worst <= TOLERANCE * max(1.0, scale):
            raise ModelError(
                f"{name} gives logits that differ by {worst:.2g} from the student's, whose largest is "
                f"{scale:.2g}; its code may depend on values in a way that cannot be exported"
            )


def _to_onnx(model: nn.Module, example: Tensor, path: Path) -> Infer:
    import_extra("onnxscript", extra="onnx", what="--onnx")
    runtime = import_extra("onnxruntime", extra="onnx", what="--onnx")
    # torch warns of its own affairs, which are nothing to whoever exports
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


def _to_pt2(model: nn.Module, example: Tensor, path: Path) -> Infer:
    with _explained("an exported program"), warnings.catch_warnings(action="ignore"):
        program = torch.export.export(
            model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        with path.open("wb") as file:
            torch.export.save(program, file)
        with path.open("rb") as file:
            loaded = torch.export.load(file).module()
    return lambda inputs: loaded(inputs).detach()


class _explained:  # reads as a word in a with statement
    """What torch raises while it exports becomes one line."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            said = " ".join(str(error).split())[:300]
            raise ModelError(
                f"the student cannot be exported as {self.what}: {type(error).__name__}: {said}"
            ) from error
