"""Which token a row of a file is about, by evidence: a teacher's rows give the tokens what they promise.

A row promises that the token it is about is among its entries as often as these sum to, and the most probable
of them as often as that one's probability says. Rows that are shifted by one, in another order, or of another
document keep the promise no better than chance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from softcache.errors import DataError, ModelError, SettingsError
from softcache.teachers.token_files import ROWS, TokenFile
from softcache.util.log import inform, verdict

Indices = npt.NDArray[np.int64]
Floats64 = npt.NDArray[np.float64]

MOST_ROWS = 200_000  # of which it is found which token they are about
PLACES = (
    1,
    0,
    2,
    -1,
)  # how far ahead of a row its token may be; the first two are what people write
SIGMAS = 5.0  # standard deviations that chance may explain
KEPT = 0.5  # share of the promise that the rows of a document keep at least, next to those of the others
FEWEST = 0.25  # the same of all rows
FEWEST_ROWS = 20  # of which anything is said


@dataclass(frozen=True)
class Fit:
    """What rows promise of the tokens that they are about, and what these are; one value for each row.

    Attributes:
        documents: the document of the row.
        probability: of the token, 0 if it has no entry.
        listed: whether it has an entry.
        mass: the sum of the entries.
        right: whether it is the most probable one.
        confidence: the probability of that.
    """

    documents: Indices
    probability: Floats64
    listed: Floats64
    mass: Floats64
    right: Floats64
    confidence: Floats64

    def promises(self) -> tuple[tuple[str, Floats64, Floats64], ...]:
        """What is promised, in words, with what is found (rows,) and what was promised (rows,)."""
        return (
            ("are the most probable one", self.right, self.confidence),
            ("have an entry", self.listed, self.mass),
        )

    def keeps_promise(self, share: float) -> bool:
        """Whether the tokens are what the rows promise, or less by chance, or at least this share of it."""
        return not any(_is_broken(found, promised, share) for _, found, promised in self.promises())

    def of(self, document: int) -> Fit:
        """The fit of the rows of one document."""
        own = self.documents == document
        return Fit(*(getattr(self, field.name)[own] for field in fields(self)))


def fit_of(file: TokenFile, ahead: int, most: int | None = None) -> tuple[Fit, Indices]:
    """The fit of all rows that have entries and whose token is in the document, and which rows these are.

    Args:
        ahead: how far ahead of a row its token is.
        most: look only at about so many rows, of the first documents.
    """
    stop = len(file.counts)
    if most is not None and stop > most:
        stop = int(file.row_offsets[np.searchsorted(file.row_offsets, most)])
    layout, rows = file.rows(), np.arange(stop)
    documents = layout.samples_of(rows)
    tokens = layout.positions_of(rows) + ahead
    counts = file.counts[:stop]
    valid = (tokens >= 0) & (tokens < np.diff(file.token_offsets)[documents]) & (counts > 0)
    labels = np.full(stop, -1, np.int32)
    labels[valid] = file.tokens[file.token_offsets[documents[valid]] + tokens[valid]]
    entries = slice(0, int(file.entry_offsets[stop]))
    row_of = np.repeat(rows, counts)
    probabilities = np.exp(file.log_probs[entries].astype(np.float64))
    own = file.ids[entries] == np.repeat(labels, counts)
    probability = np.bincount(row_of[own], probabilities[own], stop).astype(np.float64)
    listed = np.bincount(row_of[own], minlength=stop) > 0
    mass = np.minimum(np.bincount(row_of, probabilities, stop), 1)
    filled = np.flatnonzero(counts)
    confidence = np.zeros(stop)
    if len(filled):
        confidence[filled] = np.maximum.reduceat(probabilities, file.entry_offsets[:-1][filled])
    right = listed & (probability >= confidence)
    kept = np.flatnonzero(valid)
    fit = Fit(
        np.asarray(documents[kept], np.int64),
        probability[kept],
        listed[kept].astype(np.float64),
        mass[kept],
        right[kept].astype(np.float64),
        np.minimum(confidence[kept], 1),
    )
    return fit, np.asarray(kept, np.int64)


def find_ahead(file: TokenFile, *, strict: bool) -> int:
    """How far ahead of each row of the file the token is that it is about, 1 or 0.

    Where the file or its layout states it, that is compared with the evidence; else the evidence decides.

    Raises:
        DataError: with `strict`, the rows are about other tokens than stated, or are shifted.
        SettingsError: nothing is stated, and there is no evidence.
    """
    fits, probabilities = {}, {}
    for ahead in PLACES:
        fits[ahead], rows = fit_of(file, ahead, MOST_ROWS)
        probabilities[ahead] = np.full(len(file.counts), np.nan)
        probabilities[ahead][rows] = fits[ahead].probability
    best = PLACES[0]
    for ahead in PLACES[1:]:
        if _is_better(probabilities[ahead], probabilities[best]):
            best = ahead
    stated = file.ahead
    if stated is None and best in ROWS.values():
        if not _is_better(probabilities[best], probabilities[1 - best]):
            raise SettingsError(
                f"teacher {file.name} does not state which token a row is about, and its probabilities do "
                "not tell; add ?rows=next if the row at position i is about token i + 1, or ?rows=same if it "
                "is about token i"
            )
        what = "i + 1" if best else "i"
        inform(
            f"teacher {file.name}: the row at position i is about token {what}, by its probabilities"
        )
        return best
    chosen = PLACES[0] if stated is None else stated
    shifted = _is_better(probabilities[best], probabilities[chosen])
    if not shifted or not fits[best].keeps_promise(FEWEST):
        return chosen  # where the rows fit nothing, check_alignment() says so
    expected = {1: "token i + 1", 0: "token i"}[chosen]
    found = f"i + {best}" if best > 0 else "i" if best == 0 else f"i - {-best}"
    means = [float(np.nanmean(probabilities[ahead])) for ahead in (best, chosen)]
    hint = {1: "; state it with ?rows=next", 0: "; state it with ?rows=same"}.get(
        best, ": rows are missing or added at the front of each document"
    )
    _object(
        f"teacher {file.name}: the rows are shifted by one: the row at position i gives token {found} a mean "
        f"probability of {means[0]:.3f}, and {expected}, which it should be about, {means[1]:.3f}{hint}",
        strict=strict,
    )
    return chosen


def check_alignment(file: TokenFile, ahead: int, *, strict: bool) -> None:
    """Check that the rows of each document are about its tokens.

    Raises:
        DataError: with `strict`, they are not.
    """
    fit, _ = fit_of(file, ahead)
    if not len(fit.documents):
        return
    for what, found, promised in fit.promises():
        if _is_broken(found, promised, FEWEST):
            _object(
                f"teacher {file.name}: {found.mean():.1%} of the tokens {what} of the row about them, and "
                f"the rows promise {promised.mean():.1%}: the rows are in another order than the tokens, or "
                "the ids are those of another tokenizer",
                strict=strict,
            )
            return
    for what, found, promised in fit.promises():
        count = file.documents
        sums = np.bincount(fit.documents, found, count)
        expected = np.bincount(fit.documents, promised, count)
        variance = np.bincount(fit.documents, promised * (1 - promised), count)
        share = KEPT * min(1.0, float(sums.sum() / max(expected.sum(), 1e-9)))
        broken = (expected - sums > SIGMAS * np.sqrt(np.maximum(variance, 0.25))) & (
            sums < share * expected
        )
        if broken.any():
            number = int(broken.argmax())
            rows = int((fit.documents == number).sum())
            _object(
                f"teacher {file.name}: of the {rows:,} tokens of document {number}, "
                f"{sums[number] / rows:.1%} {what} of the row about them, and the rows promise "
                f"{expected[number] / rows:.1%}: {_cause(file, number, ahead)} "
                f"({int(broken.sum()):,} documents in all)",
                strict=strict,
            )
            return


def check_own_tokens(
    file: TokenFile, file_rows: Indices, labels: npt.NDArray[np.int32], ahead: int
) -> None:
    """Check that each row has an entry for the token that it is about.

    Args:
        file_rows: (rows,) the rows of the file that the data uses.
        labels: (rows,) the tokens that they are about.

    Raises:
        ModelError: one has none, so that it is about another token.
    """
    own = np.full(len(file.counts), -1, np.int32)
    own[file_rows] = labels
    listed = np.zeros(len(file.counts), np.bool_)
    row_of = np.repeat(np.arange(len(file.counts)), file.counts)
    listed[row_of[file.ids == np.repeat(own, file.counts)]] = True
    absent = file_rows[~listed[file_rows]]
    if len(absent):
        row = int(absent[0])
        document = int(file.rows().samples_of(np.array([row]))[0])
        raise ModelError(
            f"{file.where(row)} has no entry for token id {own[row]}, the token at position "
            f"{row - file.row_offsets[document] + ahead} that it is about, and vLLM always returns one: "
            f"{_cause(file, document, ahead)} ({len(absent):,} of {len(file_rows):,} rows)"
        )


def _cause(file: TokenFile, number: int, ahead: int) -> str:
    """Why the rows of a document do not fit: they are shifted, or they belong to other tokens."""
    fits = {place: fit_of(file, place)[0].of(number) for place in PLACES}
    means = {
        place: float(fit.probability.mean()) for place, fit in fits.items() if len(fit.documents)
    }
    best = max(means, key=lambda place: means[place], default=ahead)
    if best != ahead and means[best] > 2 * means.get(ahead, 0) and fits[best].keeps_promise(KEPT):
        return f"its rows are shifted by {abs(best - ahead)}"
    return "its rows belong to other tokens, such as those of another document"


def _is_broken(found: Floats64, promised: Floats64, share: float) -> bool:
    """Whether much less is found (rows,) than was promised (rows,), beyond chance."""
    expected = float(promised.sum())
    spread = math.sqrt(max(float((promised * (1 - promised)).sum()), 0.25))
    total = float(found.sum())
    return expected - total > SIGMAS * spread and total < share * expected


def _is_better(first: Floats64, second: Floats64) -> bool:
    """Whether the probabilities of tokens are higher under one alignment of the rows, beyond chance."""
    gain = first - second
    gain = gain[np.isfinite(gain)]
    if len(gain) < FEWEST_ROWS:
        return False
    return (
        float(gain.mean()) > SIGMAS * float(gain.std()) / math.sqrt(len(gain)) and gain.mean() > 0
    )


def _object(text: str, *, strict: bool) -> None:
    """Raise a DataError, or warn."""
    if strict:
        raise DataError(
            f"{text}. Nothing was written; import with --no-strict to accept the rows all the same"
        )
    verdict(text)
