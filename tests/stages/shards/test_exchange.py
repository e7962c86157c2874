"""Export and import: a set that others can read, and that comes back as it was."""

from __future__ import annotations

import gc
import json
import warnings
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt
from safetensors.torch import load

from rats.pipeline.store.embeddings import read_embedding
from rats.pipeline.store.scores import read_scores, reward_column, reward_columns
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import read_sample, verify_shard, write_shard
from rats.schemas.errors import CannotCreateError, ConfigError, DataError
from rats.schemas.manifest import ShardPlan
from rats.stages.shards import take_in
from rats.stages.shards.card import LicenseTerms, size_category
from rats.stages.shards.exchange import export_set, import_set
from rats.stages.shards.untrusted import verify_untrusted
from rats.stages.shards.verify import verify
from rats.stages.templates.render import code
from tests.support.project import rats, tree, write_project
from tests.support.rolled import TERMS, export, fill, roll
from tests.support.shards import embed, params, recipe_of, score, wanted, write_set


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five prompts, two noises each, in three shards; tests only read it."""
    return export(tmp_path_factory.mktemp("exported"))


def same_samples(shards: ShardSet, others: ShardSet) -> bool:
    """Whether two sets' newest snapshots hold the same bytes and scores."""
    snapshots = shards.snapshot(), others.snapshot()
    rows = shards.index(snapshots[0])
    keys = [row.key for row in rows]
    scores = [read_scores(s, reward_column(s, "hps")[0], keys) for s in (shards, others)]
    for row in rows:
        read_embedding(others, row.prompt_id)
    read = [[read_sample(s, row)["x"].tobytes() for row in s.index(s.snapshot())] for s in (shards, others)]
    return snapshots[0].hash == snapshots[1].hash and scores[0] == scores[1] and read[0] == read[1]


def test_the_card_says_what_it_is_and_under_which_terms(exported: Path):
    shards = ShardSet.open(exported)
    card = DatasetCard.load(exported / "README.md", ignore_metadata_errors=False)
    assert card.data.license == "apache-2.0" and card.data.size_categories == "n<1K"
    assert card.data.configs == [{"config_name": "default", "data_files": [{"split": "train", "path": "shards/*.tar"}]}]
    column = next(iter(reward_columns(shards)))
    for fact in (shards.fingerprint, shards.snapshot().hash, column, "d" * 64, "arXiv 2604.14910", "eprint", "0.875"):
        assert fact in card.content
    assert "5, 2 noises a prompt" in card.text and "| 9 | 1 | `scores/" in card.text
    assert "{{" not in card.text and "{%" not in card.text and str(exported) not in card.content


def test_every_sample_opens_in_datasets_whole_and_streaming(exported: Path, tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    shards = ShardSet.open(exported)
    rows = {row.key: row for row in shards.index(shards.snapshot())}
    whole = datasets.load_dataset(str(exported), cache_dir=str(tmp_path))
    stream = datasets.load_dataset(str(exported), streaming=True)
    for found in (list(whole["train"]), list(stream["train"])):
        assert sorted(sample["__key__"] for sample in found) == sorted(rows)
        for sample in found:
            expected, tensors = read_sample(shards, rows[sample["__key__"]]), load(sample["latents.safetensors"])
            assert {name: tensor.numpy().tobytes() for name, tensor in tensors.items()} == {
                name: array.tobytes() for name, array in expected.items()
            }
            assert sample["json"]["prompt"] == rows[sample["__key__"]].prompt


def test_every_sample_opens_in_webdataset(exported: Path):
    import webdataset

    shards = ShardSet.open(exported)
    paths = [str(path) for path in sorted(exported.glob("shards/*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files to the garbage collector
        found = {sample["__key__"]: sample for sample in webdataset.WebDataset(paths, shardshuffle=False)}
        gc.collect()
    for row in shards.index(shards.snapshot()):
        assert json.loads(found[row.key]["json"])["noise_index"] == row.noise_index
        assert (
            load(found[row.key]["latents.safetensors"])["x"].numpy().tobytes()
            == read_sample(shards, row)["x"].tobytes()
        )


def test_the_cards_way_to_the_scores_works(exported: Path, monkeypatch: pytest.MonkeyPatch):
    text = (exported / "README.md").read_text()
    (block,) = [part for part in text.split("```python\n") if part.startswith("from glob")]
    monkeypatch.chdir(exported)
    found: dict[str, dict[str, float]] = {}
    exec(block.partition("```")[0], found)
    shards = ShardSet.open(exported)
    scored = {key: score for key, score in found["scores"].items() if score is not None}
    assert (
        scored == read_scores(shards, reward_column(shards, "hps")[0], found["scores"]) and len(found["scores"]) == 10
    )


@pytest.mark.parametrize(
    ("terms", "hint"),
    [
        (LicenseTerms(""), "--license ID"),
        (LicenseTerms("MIT"), "identifier"),
        (LicenseTerms("other"), "--license-link"),
        (LicenseTerms("other", "my terms", "https://example.org"), "spaces"),
    ],
)
def test_without_clear_terms_nothing_is_exported(exported: Path, tmp_path: Path, terms: LicenseTerms, hint: str):
    with pytest.raises(ConfigError, match=hint):
        export_set(exported, tmp_path / "new", terms)
    assert list(tmp_path.iterdir()) == []


def test_export_replaces_an_export_and_nothing_else(tmp_path: Path):
    shards = roll(tmp_path / "store", wanted(2))
    export_set(shards.root, tmp_path / "out", TERMS)
    before = tree(tmp_path / "out")
    export_set(shards.root, tmp_path / "out", TERMS)
    assert tree(tmp_path / "out") == before
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(CannotCreateError, match="something else"):
        export_set(shards.root, tmp_path / "out", TERMS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    with pytest.raises(CannotCreateError):
        export_set(shards.root, tmp_path / "mine", TERMS)


def test_a_column_that_is_not_complete_stays_behind(tmp_path: Path):
    shards = roll(tmp_path / "store", wanted(3))
    column = reward_column(shards, "hps")[0]
    (shards.scores_folder(column) / "rollout-000000.done.json").unlink()
    assert export_set(shards.root, tmp_path / "out", TERMS)["rewards"] == 0
    assert reward_columns(ShardSet.open(tmp_path / "out")) == {}
    assert "## Scores" not in (tmp_path / "out" / "README.md").read_text()


def test_what_was_exported_comes_back_the_same_and_a_second_import_changes_nothing(exported: Path, tmp_path: Path):
    first = import_set(exported, tmp_path / "store")
    shards = ShardSet.open(Path(first["path"]))
    assert shards.root.name == shards.fingerprint == ShardSet.open(exported).fingerprint
    assert (first["samples"], first["shards_added"], first["embeddings_added"], first["renamed"]) == (10, 3, 5, [])
    assert same_samples(shards, ShardSet.open(exported)) and verify(shards.root)["ok"]
    assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in shards.root.rglob("*") if path.is_file())
    stamps = {path: path.stat().st_mtime_ns for path in shards.root.rglob("*") if "locks" not in path.parts}
    second = import_set(exported, tmp_path / "store")
    assert (second["snapshot"], second["shards_added"], second["scores_added"]) == (first["snapshot"], 0, 0)
    assert stamps == {path: path.stat().st_mtime_ns for path in shards.root.rglob("*") if "locks" not in path.parts}


def test_a_rollout_finds_every_imported_shard_done(exported: Path, tmp_path: Path):
    import_set(exported, tmp_path / "store")
    shards = ShardSet.open_or_create(tmp_path / "store", recipe_of(params()))
    plans = shards.plan(wanted(), shard_samples=7)  # another size than the one they were made with
    assert len(plans) == 3 and all(shards.done(plan.shard) for plan in plans)
    grown = shards.plan(wanted(6), shard_samples=7)
    assert [plan.shard for plan in grown if not shards.done(plan.shard)] == ["rollout-000003"]


def test_shards_whose_number_is_taken_get_the_next_free_one(exported: Path, tmp_path: Path):
    own = roll(tmp_path / "store", wanted(9)[10:])
    old = own.snapshot()
    report = import_set(exported, tmp_path / "store")
    assert report["renamed"] == ["rollout-000000 -> rollout-000003", "rollout-000001 -> rollout-000004"]
    assert report["shards_added"] == 3 and own.done("rollout-000002") is not None
    assert own.index(own.snapshot(old.number)) and own.snapshot(old.number) == old
    assert same_samples(own, ShardSet.open(exported)) and verify(own.root)["ok"]
    tars = [ShardSet.open(exported).shard_path("rollout-000000"), own.shard_path("rollout-000003")]
    assert tars[0].read_bytes() == tars[1].read_bytes()
    both = own.write_snapshot(sample.key for sample in wanted(9))
    assert (
        both.samples == 18
        and len(read_scores(own, reward_column(own, "hps")[0], [r.key for r in own.index(both)])) == 17
    )


def test_a_half_made_plan_is_fulfilled_and_what_is_there_is_not_brought_again(exported: Path, tmp_path: Path):
    shards = ShardSet.open_or_create(tmp_path / "store", recipe_of(params()))
    first, second, third = shards.plan(wanted(), 4)
    write_shard(shards, first, fill(shards, first))
    assert import_set(exported, tmp_path / "store")["shards_added"] == 2
    assert len(shards.plans()) == 3 and shards.done(second.shard) and shards.done(third.shard)
    assert same_samples(shards, ShardSet.open(exported))  # scores of the shard that was there came along


def test_a_shard_that_brings_some_new_samples_comes_whole_and_each_counts_once(exported: Path, tmp_path: Path):
    roll(tmp_path / "store", wanted(3), shard_samples=3)
    import_set(exported, tmp_path / "store")
    shards = ShardSet.open_or_create(tmp_path / "store", recipe_of(params()))
    assert same_samples(shards, ShardSet.open(exported)) and shards.snapshot().samples == 10


def test_a_planned_shard_whose_samples_came_in_by_an_import_is_not_made(exported: Path, tmp_path: Path):
    shards = ShardSet.open_or_create(tmp_path / "store", recipe_of(params()))
    assert len(shards.plan(wanted(), 3)) == 4
    import_set(exported, tmp_path / "store")
    plans = shards.plan(wanted(), 3)
    assert len(plans) == 3 and all(shards.done(plan.shard) for plan in plans)


def test_other_bytes_of_one_recipe_are_an_error_that_names_the_sample(exported: Path, tmp_path: Path):
    shards = ShardSet.open_or_create(tmp_path / "store", recipe_of(params()))
    (plan,) = shards.plan(wanted(1), 4)
    samples = fill(shards, plan)
    samples[1][1]["x"][3] += 1
    write_shard(shards, plan, samples)
    before = tree(tmp_path / "store")
    with pytest.raises(DataError, match=f"different bytes: sample {samples[1][0].key}"):
        import_set(exported, tmp_path / "store")
    assert tree(tmp_path / "store") == before


@pytest.mark.parametrize("stop", ["_copy", "write_document", "_take_scores"])
def test_an_import_that_was_killed_goes_on(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str):
    import_set(exported, tmp_path / "undisturbed")
    real, calls = getattr(take_in, stop), []

    def dies(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == (7 if stop == "_copy" else 1):
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(take_in, stop, dies)
        import_set(exported, tmp_path / "store")
    for shard in (tmp_path / "store").glob("*/shards/*.done.json"):
        verify_shard(ShardSet.open(shard.parents[1]), shard.name.partition(".")[0])
    import_set(exported, tmp_path / "store")
    # the claim of each shard and which locks were taken may differ, the content may not
    assert {k: v for k, v in tree(tmp_path / "store").items() if "/locks/" not in k} == {
        k: v for k, v in tree(tmp_path / "undisturbed").items() if "/locks/" not in k
    }


def test_a_file_that_changes_between_the_look_and_the_copy_is_refused(tmp_path: Path):
    folder = export(tmp_path, wanted(2))
    foreign = verify_untrusted(folder)
    tar = folder / "shards" / "rollout-000000.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.unlink()
    tar.write_bytes(data)
    with pytest.raises(DataError, match="changed while"):
        take_in.take_in(foreign, tmp_path / "store")
    assert not list((tmp_path / "store").glob("*/shards/*.tar"))


def test_plans_keep_free_names_and_never_give_one_away_twice(exported: Path):
    parts = verify_untrusted(exported).parts
    plan = ShardPlan(shard="rollout-000001", samples=tuple(wanted(9)[16:]))
    names, new = take_in.choose_names(parts, [plan], ["rollout-000002.tar"])
    assert names == {
        "rollout-000000": "rollout-000000",
        "rollout-000001": "rollout-000003",
        "rollout-000002": "rollout-000004",
    }
    assert [entry.shard for entry in new] == sorted(names.values())
    first = ShardPlan(shard="rollout-000000", samples=plan.samples)
    assert take_in.choose_names(parts, [first], [])[0]["rollout-000000"] == "rollout-000003"


def test_a_set_goes_into_a_remote_store_and_comes_from_one(exported: Path, tmp_path: Path):
    from rats.pipeline.files.places import open_place

    store = open_place("memory://imported")
    report = import_set(exported, store)
    shards = ShardSet.open(report["path"])
    assert same_samples(shards, ShardSet.open(exported))
    export_set(shards.root, tmp_path / "out", TERMS)
    assert same_samples(ShardSet.open(tmp_path / "out"), shards)


def test_on_the_command_line_a_rollout_after_an_import_runs_no_teacher(models: Path, tmp_path: Path):
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        write_project(models, tmp_path / name)
    made = json.loads(rats(tmp_path / "ours", "stage", "rollout", "--json").stdout)
    root = str(tmp_path / "ours" / "store" / made["fingerprint"])
    assert "licence" in rats(tmp_path, "shards", "export", root, "out", code=2).stderr
    rats(tmp_path, "shards", "export", root, "out", "--license", "mit")
    taken = json.loads(rats(tmp_path / "theirs", "shards", "import", "../out", "--json").stdout)
    report = json.loads(rats(tmp_path / "theirs", "stage", "rollout", "--json").stdout)
    assert (report["teacher_forwards"], report["shards_reused"]) == (0, made["shards_total"])
    assert report["fingerprint"] == made["fingerprint"] == taken["fingerprint"]
    assert taken["hash"] == ShardSet.open(tmp_path / "theirs" / "store" / made["fingerprint"]).snapshot().hash


def test_a_card_of_hostile_names_shows_them_and_nothing_else(tmp_path: Path):
    shards = write_set(tmp_path / "store", wanted(2))
    embed(shards, wanted(2))
    hostile = "<img src=x>|[a](b)`\n# owned\x1b[2J"
    score(shards, hostile)
    terms = LicenseTerms("other", "<b>x</b>", "https://a.example/)<b>", hostile, hostile)
    export_set(Path(shards.root), tmp_path / "out", terms)
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert "\x1b" not in card.text and "\n# owned" not in card.text
    page = MarkdownIt("commonmark").enable("table").render(card.text)
    assert "<img" not in page and "<b>" not in page and "<strong>&lt;b&gt;x&lt;/b&gt;</strong>" in page
    # title, licence, teacher, and the reward's name twice
    assert page.count("&lt;img src=x&gt;|[a](b)` # owned [2J") == 5
    assert '<a href="https://a.example/)%3Cb%3E">the terms</a>' in page


def test_words_of_the_card():
    assert [size_category(n) for n in (1, 999, 1000, 825_000, 10**6)] == [
        "n<1K",
        "n<1K",
        "1K<n<10K",
        "100K<n<1M",
        "1M<n<10M",
    ]
    assert code("a|b") == "`a\\|b`" and code("`x`").startswith("``` ") and "\n" not in code("a\nb")
