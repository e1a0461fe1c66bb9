from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from titanlm.config import load
from titanlm.datasets.documents import INDEX_BITS
from titanlm.datasets.mixture import Mixture, Source
from titanlm.errors import ConfigError, DataError
from titanlm.registry import Component
from titanlm.stream import build_streams

TOKENIZER = Component.named("tokenizer", "byte")


def source(name: str, weight: float = 1.0, epochs: int = 0, **settings) -> Source:
    return Source(name=name, weight=weight, epochs=epochs, dataset=Component.named("dataset", "synthetic", **settings))


def streams(sources, n_streams=2, split="train", **settings):
    common = {"split": split, "n_streams": n_streams, "seed": 1, "seq_len": 64}
    return build_streams(sources, Component.named("packer", "concat"), TOKENIZER.build(), **common, **settings)


THREE = [source("long", 5, mean_tokens=400), source("short", 3, mean_tokens=40), source("rare", 1, mean_tokens=100)]


def test_shares_are_of_tokens_at_any_time_whatever_the_lengths():
    mixture = streams(THREE)[0].dataset
    assert isinstance(mixture, Mixture)
    assert mixture.n_sources == 3
    tokens = Counter()
    for n, document in enumerate(islice(mixture, 4000)):
        tokens[document.document_id % 3] += len(document.ids)
        if n > 1000:
            total = sum(tokens.values())
            for number, share in enumerate((5 / 9, 3 / 9, 1 / 9)):
                # The streams' offsets, and one document.
                assert abs(tokens[number] - share * total) <= 2048 * share + 600
    assert [tokens[number] for number in range(3)] == mixture.state()["tokens"]


def test_streams_do_not_all_read_the_same_source_at_once():
    first = Counter(next(stream.dataset).document_id % 3 for stream in streams(THREE, 32))
    assert len(first) == 3


def test_every_document_of_a_source_comes_once_an_epoch_and_ids_are_unique():
    sources = [source("a", 2, documents=30), source("b", documents=10)]
    documents = [document for stream in streams(sources, 4, epochs=2) for document in stream.dataset]
    assert len({document.document_id for document in documents}) == len(documents) == 2 * 40
    own = Counter((document.document_id % 2, document.document_id // 2 >> INDEX_BITS) for document in documents)
    assert own == Counter({(0, n): 1 for n in range(60)} | {(1, n): 1 for n in range(20)})


def test_a_source_that_ends_leaves_the_others():
    mixture = streams([source("once", 10, epochs=1, documents=4), source("rest", 1)], 1)[0].dataset
    found = Counter(document.document_id % 2 for document in islice(mixture, 200))
    assert found == {0: 4, 1: 196}


def test_resumes_at_every_point():
    straight = [(one.document_id, one.ids.tolist()) for one in islice(streams(THREE)[1].dataset, 40)]
    for cut in range(40):
        first, second = streams(THREE)[1].dataset, streams(THREE)[1].dataset
        list(islice(first, cut))
        second.restore(first.state())
        assert [(one.document_id, one.ids.tolist()) for one in islice(second, 40 - cut)] == straight[cut:]


def test_other_splits_are_read_one_source_after_the_other():
    sources = [source("a", 1, documents=30), source("b", 9, documents=20)]
    assert [document.document_id % 2 for document in streams(sources, 1, split="validation")[0].dataset] == [0] * 3 + [1] * 2


def test_more_epochs_after_the_end_go_on():
    sources = [source("a", documents=5), source("b", documents=5)]
    first = streams(sources, 1, epochs=1)[0].dataset
    assert len(list(first)) == 10
    second = streams(sources, 1, epochs=2)[0].dataset
    second.restore(first.state())
    assert len(list(second)) == 10


def test_another_mixture_is_refused():
    state = streams(THREE)[0].dataset.state()
    with pytest.raises(DataError, match="the data is mixed of long, other, the state to resume of long, short, rare"):
        streams([THREE[0], source("other")])[0].dataset.restore(state)
    prints = {streams(sources)[0].fingerprint for sources in (THREE, THREE[:2], [source("long", 6, mean_tokens=400), *THREE[1:]])}
    assert len(prints) == 3


def test_a_dataset_without_an_end_cannot_have_epochs():
    from recipes.custom_component.titanlm_zoo import arithmetic  # noqa: F401

    endless = Source(dataset=Component.named("dataset", "arithmetic"))
    with pytest.raises(DataError, match="epochs: dataset 'arithmetic' knows no end"):
        streams([endless], epochs=1)


def test_sources_of_a_config(tiny: Path):
    both = ["--data.source=[{weight=3,dataset={name='synthetic',mean_tokens=9}},{name='own',dataset='python_stdlib'}]"]
    with pytest.raises(ConfigError, match=r"dataset: excludes `data\.source`"):
        load(tiny, both)
    lines = [line for line in tiny.read_text().splitlines() if not line.startswith(('name = "text"', "paths", "unit", "validation_fraction", "[dataset]"))]
    tiny.write_text("\n".join(lines))
    config = load(tiny, both)
    assert config.dataset is None
    assert [(one.label, one.weight) for one in config.sources] == [("synthetic", 3.0), ("own", 1.0)]
    with pytest.raises(ConfigError, match=r"data\.source: two sources are called 'synthetic'"):
        load(tiny, ["--data.source=[{dataset='synthetic'},{dataset='synthetic'}]"])
    with pytest.raises(ConfigError, match=r"data\.source\.0\.dataset\.mean_token: unknown key of dataset 'synthetic'; did you mean 'mean_tokens'"):
        load(tiny, ["--data.source=[{dataset={name='synthetic',mean_token=9}}]"])
    assert load(tiny).sources[0].dataset.name == "python_stdlib"


def test_synthetic_ids_are_drawn_evenly_and_by_seed():
    one = Component.named("dataset", "synthetic", mean_tokens=200, documents=500)

    def read(split="train", seed=1, **settings):
        tokenizer = TOKENIZER.build()
        dataset = Component.named("dataset", "synthetic", mean_tokens=200, documents=500, **settings) if settings else one
        return list(dataset.build(tokenizer=tokenizer, split=split, stream=0, n_streams=1, seed=seed, epochs=1))

    documents = read()
    assert len(documents) == 500
    assert all(document.ids[0] == document.ids[-1] == 256 and document.n_bytes is None for document in documents)
    ids = np.concatenate([document.ids[1:-1] for document in documents])
    counts = np.bincount(ids, minlength=257)
    assert counts[256] == 0
    expected = len(ids) / 256
    assert ((counts[:256] - expected) ** 2 / expected).sum() < 350  # chi-squared with 255 degrees of freedom: 1 in 10,000
    assert [d.ids.tolist() for d in read()] == [d.ids.tolist() for d in documents]
    others = [read(seed=2)[0], read("validation")[0]]
    assert all(other.ids.tolist() != documents[0].ids.tolist() for other in others)
    for document in read(pattern="copy"):
        ids = document.ids[1:-1]
        half = (len(ids) + 1) // 2
        assert ids[half:].tolist() == ids[: len(ids) - half].tolist()
    assert all(len(set(document.ids[1:-1].tolist())) == 1 for document in read(pattern="constant"))
