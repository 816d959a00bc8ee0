"""The largest log-probabilities of each token, from a file, as a teacher of the same documents."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.cache.layout import RowLayout
from softcache.data.rows import TOKEN, TokenSource, layout_of_source
from softcache.data.source import Source
from softcache.errors import ModelError, SettingsError
from softcache.models.weights import file_sha256
from softcache.teachers.align_tokens import check_alignment, check_own_tokens, find_ahead
from softcache.teachers.match_documents import match_documents
from softcache.teachers.matrix import Matrix, open_top_rows
from softcache.teachers.outputs import TINY
from softcache.teachers.token_files import TokenFile, read_token_file
from softcache.util.log import inform
from softcache.util.spec import Spec

Indices = npt.NDArray[np.int64]


class TopTokens(Matrix):
    """The largest log-probabilities of each token; the rest of the mass is spread evenly.

    Attributes:
        file: the documents of the file and their entries.
        classes: the size of the vocabulary.
        file_rows: which row of the file each row of the data is, after match(); before, all in order.
    """

    def __init__(self, file: TokenFile, classes: int) -> None:
        super().__init__(file.log_probs)
        self.file, self.classes = file, classes
        self.file_rows: Indices = np.arange(len(file.counts))

    def match(self, spec: str, source: Source, *, strict: bool = False) -> None:
        """Find the documents and rows of the data in the file.

        Args:
            spec: of the teacher, for messages.
            source: the data.
            strict: refuse rows that do not fit the tokens, instead of warning.

        Raises:
            ModelError: the file lacks a document or a row of the data, or has other tokens.
            DataError: with `strict`, the rows are about other tokens than they should be.
            SettingsError: it cannot be told which token a row is about.
        """
        tokens, layout = tokens_of(source), layout_of_source(source)
        if tokens is None or layout is None:
            raise ModelError(
                f"teacher {spec} has rows of tokens, and {source.name} is no data of tokens; give the token "
                "ids that the teacher saw, such as ids:FILE"
            )
        document_of = match_documents(self.file, tokens)
        ahead = find_ahead(self.file, strict=strict)
        self.layout = layout
        self.file_rows = rows_in_file(self.file, tokens, layout, document_of, ahead)
        if self.file.has_token:
            check_own_tokens(self.file, self.file_rows, tokens.row_labels, ahead)
        check_alignment(self.file, ahead, strict=strict)

    def rows(self, samples: Indices) -> Tensor:
        """Look up rows of the data (R,): log-probabilities (R, C) float32."""
        rows, offsets = self.file_rows[samples], self.file.entry_offsets
        counts = offsets[rows + 1] - offsets[rows]
        every = RowLayout(offsets, offsets[:-1], offsets[:-1]).rows_of(rows)
        row = np.repeat(np.arange(len(rows)), counts)
        log_probs = np.minimum(self.file.log_probs[every].astype(np.float64), 0)
        mass = np.bincount(row, np.exp(log_probs), len(rows))
        tail = np.maximum((1 - mass) / np.maximum(1, self.classes - counts), TINY)
        dense = np.repeat(np.log(tail)[:, None].astype(np.float32), self.classes, 1)
        dense[row, self.file.ids[every]] = log_probs
        return torch.from_numpy(dense)


def tokens_of(source: Source) -> TokenSource | None:
    """The documents of a source as tokens; None if it has none."""
    if isinstance(source, TokenSource):
        return source
    return None


def open_top_tokens(spec: Spec, classes: int | None) -> tuple[TopTokens, dict[str, Any]]:
    """Open a file of the largest log-probabilities of each token.

    Args:
        classes: the size of the vocabulary, which the file does not tell.

    Returns:
        The rows as a module, and their provenance.

    Raises:
        SettingsError: the vocabulary is not known, or an option or the columns are not.
        MissingFileError: there is no such file.
        ModelError: the file does not hold such rows.
    """
    if spec.task != TOKEN:
        raise SettingsError(
            f"teacher {spec.text} has rows of tokens, and the data has one row for each "
            f"{spec.task or 'sample'}; give the token ids that the teacher saw, such as ids:FILE"
        )
    if classes is None:
        raise SettingsError(
            f"teacher {spec.text} has only some tokens of each row; state the size of the vocabulary with "
            "--classes, or name the tokenizer of the data with ?tokenizer=ID_OR_FOLDER"
        )
    file = read_token_file(spec)
    file.check(classes)
    say_of_sums(file)
    digest = data_sha256(file) if spec.kind == "hfds" else file_sha256(spec.path)
    return TopTokens(file, classes), {"parameters": 0, "sha256": digest}


def open_hub_rows(spec: Spec, classes: int | None) -> tuple[Matrix, dict[str, Any]]:
    """Open the largest log-probabilities of each token, or of each sample, in a Hugging Face dataset.

    Raises:
        SettingsError, DataError, ModelError: as open_top_tokens() and open_top_rows().
    """
    return open_top_tokens(spec, classes) if spec.task == TOKEN else open_top_rows(spec, classes)


def data_sha256(file: TokenFile) -> str:
    """The SHA-256 of all that was read."""
    digest = hashlib.sha256()
    for array in (file.tokens, file.token_offsets, file.row_offsets, file.entry_offsets, file.ids):
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(file.log_probs.tobytes())
    return digest.hexdigest()


def say_of_sums(file: TokenFile) -> None:
    """Log that the entries of every row sum to 1, so that nothing is known of the other tokens."""
    counts = file.counts
    rows = np.repeat(np.arange(len(counts)), counts)
    sums = np.bincount(rows, np.exp(file.log_probs), len(counts))[counts > 0]
    if len(sums) and (sums > 0.999).all():
        inform(
            f"note: teacher {file.name}: the {file.largest:,} probabilities of every row sum to 1, as if "
            "they were divided by their sum; what other tokens had is not known"
        )


def rows_in_file(
    file: TokenFile, tokens: TokenSource, layout: RowLayout, document_of: Indices, ahead: int
) -> Indices:
    """The row of the file for each row of the data, (rows,).

    Args:
        document_of: (samples,) the document of the file that each sample is.
        ahead: how far ahead of a row of the file the token is that it is about.

    Raises:
        ModelError: the file has no row, or an empty one, for a token of the data.
    """
    every = np.arange(layout.rows)
    samples, positions = layout.samples_of(every), layout.positions_of(every)
    documents = document_of[samples]
    within = positions + 1 - ahead
    rows = file.row_offsets[documents] + within
    absent = (within < 0) | (rows >= file.row_offsets[documents + 1])
    absent |= file.counts[np.where(absent, 0, rows)] == 0
    if absent.any():
        row = int(absent.argmax())
        raise ModelError(
            f"teacher {file.name} has no entries for token {positions[row] + 1} of document "
            f"{documents[row]}, and {tokens.name} predicts it in sample {samples[row]}; where only some "
            "tokens count, say which with loss_mask or labels in ids:FILE, or with loss_on="
        )
    return rows
