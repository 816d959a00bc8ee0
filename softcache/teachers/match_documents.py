"""Which document of a file each sample of the data is: by its tokens, never by its length or place alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from softcache.data.rows import TokenSource
from softcache.errors import ModelError
from softcache.teachers.token_files import TokenFile
from softcache.util.log import inform

Indices = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32]


def match_documents(file: TokenFile, source: TokenSource) -> Indices:
    """The document of the file for each sample of the data, (samples,).

    In order where the order is the same, else by content. The file may have more documents.

    Raises:
        ModelError: the file has no document with the tokens of a sample.
    """
    samples = len(source)
    places = np.full(samples, -1, np.int64)
    for sample in range(min(samples, file.documents)):
        if np.array_equal(sample_tokens(source, sample), file.document(sample)):
            places[sample] = sample
    left = np.flatnonzero(places < 0)
    if len(left):
        used = set(places[places >= 0].tolist())
        known: dict[bytes, list[int]] = {}
        for number in range(file.documents):
            known.setdefault(file.document(number).tobytes(), []).append(number)
        for sample in left.tolist():
            same = known.get(sample_tokens(source, sample).tobytes())
            if not same:
                raise ModelError(_missing(file, source, sample))
            places[sample] = next((number for number in same if number not in used), same[0])
            used.add(int(places[sample]))
        inform(
            f"note: teacher {file.name} is not in the order of {source.name} (first difference at sample "
            f"{left[0]}); matched by their tokens"
        )
    surplus = file.documents - len(np.unique(places))
    if surplus:
        inform(
            f"note: {surplus:,} of {file.documents:,} documents of teacher {file.name} are not in "
            f"{source.name} and are left out"
        )
    return places


def sample_tokens(source: TokenSource, sample: int) -> Ids:
    """The tokens of a sample, without padding."""
    return source.ids[source.offsets[sample] : source.offsets[sample + 1]]


def _missing(file: TokenFile, source: TokenSource, sample: int) -> str:
    """What is wrong where no document of the file is a sample: where the closest one differs."""
    own = sample_tokens(source, sample)
    shared = [_shared(own, file.document(number)) for number in range(file.documents)]
    number = int(np.argmax(shared))
    if not shared[number] and sample < file.documents:
        number = sample
    other, place = file.document(number), shared[number]
    head = (
        f"teacher {file.name} has no document with the tokens of sample {sample} of {source.name}: "
        f"document {number} "
    )
    padding = len(other) - len(own)
    for padded in range(file.documents) if not place else ():
        tokens = file.document(padded)
        extra = len(tokens) - len(own)
        if extra > 0 and np.array_equal(tokens[extra:], own) and len(set(tokens[:extra])) == 1:
            return (
                f"teacher {file.name} has no document with the tokens of sample {sample} of {source.name}: "
                f"document {padded} has {extra} times token {tokens[0]} in front of them, which looks like "
                "padding; write the file with attention_mask, or without padding"
            )
    if place < min(len(own), len(other)):
        return (
            f"{head}has {other[place]} at token {place}, and the sample {own[place]}; give the same tokens, "
            "by the same tokenizer"
        )
    longer = "goes on" if padding > 0 else "ends"
    return (
        f"{head}{longer} after the first {place} tokens, of {len(other):,} in the file and {len(own):,} in "
        "the data; cut both in the same way (?length=)"
    )


def _shared(first: Ids, second: Ids) -> int:
    """How many tokens two documents begin with alike."""
    length = min(len(first), len(second))
    differs = first[:length] != second[:length]
    return int(differs.argmax()) if differs.any() else length
