"""Going on with a run: N steps and N more are 2N steps, bit for bit, whatever is switched on."""

import dataclasses
import importlib
import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from personalize.nodes import session as node
from personalize.trainers.data import PersonalData, Wording
from personalize.trainers.edits import to_tensors
from personalize.trainers.errors import InputError
from personalize.trainers.loop import Step, train
from personalize.trainers.methods import METHODS
from personalize.trainers.optimizers import OPTIMIZERS
from personalize.trainers.resume import Found, find, near, of_data, sketch
from personalize.trainers.run import Run
from personalize.trainers.state import FORMAT, State, pack
from personalize.trainers.versions import versions
from tests.sessions import interrupt, monitoring, outcome, session, show
from tests.test_artifact import FORMATS
from tests.test_run import without_locks
from tests.test_writing import as_nobody, limited, told_by_child
from tests.tiny import (
    WIDTH,
    comfy_model,
    make,
    mixed_data,
    noise,
    rich_data,
    tiny_data,
    tiny_denoiser,
)

HALF = 3  # steps


@pytest.fixture(params=METHODS.values(), ids=METHODS.keys())
def method(request):
    return request.param


EVERYTHING = {
    "gradient_accumulation": 2,
    "batch_size": 1,
    "schedule": "cosine",
    "warmup_steps": 2,
    "ema_decay": 0.9,
    "noise_offset": 0.1,
    "caption_dropout": 0.3,
}
# settings under which a method keeps something that could be forgotten
OWN = {
    "apt": {"teacher_cache": 3, "view_pool": 2, "p_max": 1.0, "temperature": 1e6},
    "bnn": {"sigma": 0.01, "kl_weight": 0.1},
    "a3ft": {"gate": "half"},
    "selective_zo": {"zo_learning_rate": 1e-2, "zo_restore": "in place", "perturbations": 2},
    "para": {"init": "random"},
}


def steps_of(method, state: State | None = None, dtype=torch.float32, **settings):
    """Train a fresh network of 2 * HALF steps, from the start or a state."""
    denoiser = tiny_denoiser()
    denoiser.unet.to(dtype)
    chosen = make(method, **{"steps": 2 * HALF, **settings})
    return train(chosen, denoiser, tiny_data(3, prior=1), state)


def told(step: Step) -> str:
    """What a step says, and what is learned after it; NaN and all."""
    learned = {k: v.numpy().tobytes() for k, v in to_tensors(step.learned()).items()}
    numbers = [step.index, step.loss, step.learning_rate, step.gradient_norm, step.facts]
    return repr((numbers, learned))


def stop_after(path: Path, method, steps: int, state: State | None = None, **settings) -> list[str]:
    """Go so many steps from a state, keep the new state in a file; return what was told."""
    running, said = steps_of(method, state, **settings), []
    if state is not None:
        said.append(told(next(running)))
    for _ in range(steps):
        step = next(running)
        said.append(told(step))
    step.state().save(path)
    running.close()
    return said


def check_exact(path: Path, method, **settings) -> None:
    """Compare a whole run with one that stopped twice."""
    whole = [told(step) for step in steps_of(method, **settings)]
    parts = stop_after(path, method, 2, **settings)
    again = stop_after(path, method, 2, State.load(path), **settings)
    assert again[0] == parts[-1]  # the step of the state comes back as it was
    rest = [told(step) for step in steps_of(method, State.load(path), **settings)]
    assert rest[0] == again[-1]
    assert parts + again[1:] + rest[1:] == whole
    assert len(set(whole)) == 2 * HALF  # every step moved


def test_a_run_that_stopped_twice_is_the_whole_run_bit_for_bit(tmp_path, method):
    check_exact(tmp_path / "state", method)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_with_average_accumulation_schedule_and_the_methods_own_state(tmp_path, method, dtype):
    settings = EVERYTHING | OWN.get(method.name, {})
    check_exact(tmp_path / "state", method, dtype=dtype, **settings)


@pytest.mark.parametrize("over", ["full", "oft"])
def test_over_other_kinds_of_weights(tmp_path, over):
    check_exact(tmp_path / "state", METHODS["bnn"], over=over, sigma=0.01, block_size=8)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_every_optimizer_there_is(tmp_path, name):
    if importlib.util.find_spec(OPTIMIZERS[name][0].partition(".")[0]) is None:
        pytest.skip(f"{name} is not installed")
    check_exact(tmp_path / "state", METHODS["lora"], optimizer=name, schedule="cosine")


# Files


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> Path:
    """The state of a LoRA after two steps."""
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    stop_after(path, METHODS["lora"], 2, ema_decay=0.5)
    return path


def test_a_state_is_nothing_but_safetensors_and_json(state):
    from safetensors import safe_open

    with safe_open(state, framework="pt") as file:
        kinds = {name.partition(".")[0] for name in file.keys()}  # noqa: SIM118
        assert kinds == {"parameters", "average", "optimizer"}
        assert '"format": 1' in file.metadata()["personalize-state"]


def test_a_state_that_was_read_holds_no_file(state):
    loaded = State.load(state)
    assert str(state) not in Path("/proc/self/maps").read_text() and loaded.parameters


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_a_truncated_state_is_refused(state, tmp_path, cut):
    broken = tmp_path / "state.safetensors"
    broken.write_bytes(state.read_bytes()[:cut])
    with pytest.raises(InputError, match="state that can not be read"):
        State.load(broken)


@pytest.mark.parametrize(
    "old, new, problem",
    [
        (b'\\"format\\": 1', b'\\"format\\": 2', "format 2; update"),
        (b'\\"values\\"', b'\\"valuez\\"', "can not be read"),
        (b'\\"index\\", 2', b'\\"index\\", 0', "step 0"),
        (b'\\"tuple\\"', b'\\"topple\\"'[:-1], "can not be read"),
    ],
)
def test_a_state_of_another_kind_is_refused(state, tmp_path, old, new, problem):
    data = state.read_bytes()
    if old not in data:
        pytest.fail(f"{old} is not in the header")
    broken = tmp_path / "state.safetensors"
    broken.write_bytes(data.replace(old, new.ljust(len(old))))
    with pytest.raises(InputError, match=problem):
        State.load(broken)


def test_a_state_of_another_network_is_refused(state):
    with pytest.raises(InputError, match="state that does not fit"):
        next(steps_of(METHODS["lora"], State.load(state), rank=3))
    with pytest.raises(InputError, match="state that does not fit"):
        next(steps_of(METHODS["para"], State.load(state)))


@pytest.mark.parametrize("shape", [(1,), (7, 3), (10**5,)])
def test_a_state_with_numbers_for_other_weights_is_refused_and_kills_nothing(state, shape):
    """AdamW's kernel writes where the shapes say: without a look at them the process would die."""
    lying = State.load(state)
    for kept in lying.optimizer["state"].values():
        kept["exp_avg"] = torch.zeros(shape)

    def go_on() -> None:
        for _ in steps_of(METHODS["lora"], lying, ema_decay=0.5):
            pass

    told = told_by_child(go_on)
    assert told.startswith("InputError: 'name' has a state that does not fit (an optimizer's state")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eps", "a word"),
        ("betas", (0.9,)),
        ("betas", 0.9),
        ("lr", math.nan),
        ("weight_decay", 1e39),
    ],
)
def test_a_state_whose_optimizer_has_strange_numbers_is_refused(state, name, value):
    lying = State.load(state)
    lying.optimizer["param_groups"][0][name] = value
    with pytest.raises(InputError, match=f"has a state that does not fit .{name} .* was expected"):
        next(steps_of(METHODS["lora"], lying, ema_decay=0.5))


def test_a_state_of_the_first_version_is_gone_on_from():
    """tests/formats/1/state.safetensors was written by the first version that kept states."""
    old = State.load(FORMATS / str(FORMAT) / "state.safetensors")
    how = {"steps": 4, "rank": 1, "layers": "cross-attention", "ema_decay": 0.5}
    assert [step.index for step in steps_of(METHODS["lora"], old, **how)] == [2, 3, 4]
    assert old.versions == {}


def test_what_a_state_can_not_hold_is_named():
    with pytest.raises(InputError, match=r"'optimizer' keeps a set \(optimizer.x\)"):
        pack({"x": {1, 2}}, "optimizer", {})


def test_a_state_is_not_moved_by_later_steps():
    running = steps_of(METHODS["lora"], ema_decay=0.5)
    kept = next(running).state()
    before = repr(kept)
    next(running)
    assert repr(kept) == before


def test_what_is_half_moved_is_never_kept():
    running = steps_of(METHODS["lora"], optimizer="sgd")
    step = next(running)

    def fail(*_, **__):
        raise torch.OutOfMemoryError("half way")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("torch.optim.sgd"), "sgd", fail)
        with pytest.raises(torch.OutOfMemoryError):
            next(running)
    with pytest.raises(FloatingPointError, match="half moved after step 1"):
        step.state()


# In ComfyUI


@pytest.fixture
def root(monkeypatch, tmp_path) -> Path:
    """Where runs go; nothing is shown."""
    monkeypatch.setattr(node, "runs_root", lambda: tmp_path)
    show(monkeypatch)
    return tmp_path


def cancelled(monkeypatch, at: int = 3, **how) -> None:
    """Train, and cancel after a step."""
    import comfy.model_management as memory

    with monkeypatch.context() as patch:
        show(patch, lambda text: text.startswith(f"step {at} ") and interrupt())
        with pytest.raises(memory.InterruptProcessingException):
            session(**how).train()


def names(root: Path) -> list[str]:
    return sorted(folder.name for folder in root.iterdir())


LARGE = {"learning_rate": 0.3, "steps": 80}  # held-out loss rises, at a step that rounding decides
HOW = {"a3ft": {"learning_rate": 0.1, "steps": 80}, "para": {"learning_rate": 0.3, "steps": 30}}


@pytest.mark.slow
def test_every_method_goes_on_under_a_monitor_that_stops_early(root, monkeypatch, method):
    how = {
        "method": method.name,
        "monitor": monitoring(every=1, early_stop=True, patience=1),
        **HOW.get(method.name, LARGE),
    }
    learned = session("whole", **how).train()
    whole = Run(root / "whole")
    never_worse = method.name == "para"  # on pictures of noise
    assert whole.ended() == ("finished" if never_worse else "stopped early")
    last = whole.history()[-1]["step"]
    for at in sorted({2, last - 1}):  # twice in a row
        cancelled(monkeypatch, at, name="parts", **how)
    parts = Run(root / "parts")
    assert outcome(parts, session("parts", **how).train()) == outcome(whole, learned)
    assert names(root) == ["parts", "whole"]


def test_a_finished_run_is_handed_on_without_training(root, monkeypatch):
    how = {"monitor": monitoring(every=2), "learning_rate": 0.1}
    first = session(**how)
    learned = first.train()
    files = {p.name: p.stat().st_mtime_ns for p in (root / "some").iterdir() if p.name != ".lock"}
    again = session(**how)
    monkeypatch.setattr(node, "train", None)
    handed_on = again.train()
    assert outcome(Run(root / "some"), handed_on) == outcome(Run(root / "some"), learned)
    assert again.losses == first.losses and len(first.losses) == 8
    assert "run 'some' finished before, and nothing changed" in again.summary(handed_on)
    assert {
        p.name: p.stat().st_mtime_ns for p in (root / "some").iterdir() if p.name != ".lock"
    } == files


@pytest.mark.parametrize("how", [{"early_stop": True, "patience": 1}, {"restore_best": False}])
def test_a_finished_run_hands_on_what_it_did_before(root, how):
    how = {"monitor": monitoring(every=1, **how), "learning_rate": 0.3, "steps": 12}
    learned, again = (session(**how).train() for _ in range(2))
    assert again.header == learned.header and again.tensors.keys() == learned.tensors.keys()
    assert all(torch.equal(again.tensors[k], v) for k, v in learned.tensors.items())


CHANGES = {
    "learning rate": ({"learning_rate": 2e-2}, "learning_rate was 0.01, now 0.02"),
    "several": ({"seed": 1, "steps": 4}, "steps was 3, now 4; seed was 0, now 1"),
    "method": ({"method": "para"}, "the method was lora, now para"),
    "pictures": ({"data": tiny_data(4)}, "data has other pictures or captions"),
    "prompt": (
        {"data": replace(tiny_data(3, held_out=2), instance_prompt="a mog")},
        "instance_prompt was 'a zib totem', now 'a mog'",
    ),
    "sizes": (
        {"data": mixed_data()},
        "data's sizes was ['64x64'], now ['64x64', '64x96', '96x64']",
    ),
    "base": ({"base": {"seed": 1}}, "the base has other weights"),
    "schedule": ({"base": {"prediction": "V_PREDICTION"}}, "the base has another schedule"),
    "monitor": ({"monitor": monitoring()}, "a monitor was not connected"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "cancelled"])
def test_what_changed_is_said_and_a_new_run_begins(root, monkeypatch, change, finished):
    how, said = CHANGES[change]
    model = comfy_model(**how.get("base", {}))
    how = {name: value for name, value in how.items() if name != "base"}
    if finished:
        session(steps=3).train()
    else:
        cancelled(monkeypatch, at=2, steps=3)
    before = {p.name: p.read_bytes() for p in (root / "some").iterdir()}
    changed = session(**{"steps": 3, "model": model, **how})
    summary = changed.summary(changed.train())
    assert f"New run 'some 2': {said}" in summary
    assert {p.name: p.read_bytes() for p in (root / "some").iterdir()} == before
    assert names(root) == ["some", "some 2"]
    back = session(steps=3)  # as it was at first: that run is still there
    assert back.train() and names(root) == ["some", "some 2"]
    assert ("finished before" if finished else "resumed at step 2") in back.said


def test_of_data_that_changed_it_is_said_how():
    before, now = tiny_data(3), rich_data()
    told = list(of_data(before.traits(), now.traits()))
    assert told == [
        "data's sizes was ['64x64'], now ['64x64', '64x96', '96x64']",
        "data's masks was 0, now 3",
        "data's mirrored pictures was 0, now 7",
        "data's wordings was 0, now 21",
        "data's subjects was [], now ['a zib totem', 'a mog sprite']",
        "data's turns was False, now True",
    ]
    assert list(of_data({}, now.traits())) == ["data has other pictures or captions"]


def test_a_changed_monitor_is_named_with_its_values(root):
    session(steps=2, monitor=monitoring(every=1)).train()
    changed = session(steps=2, monitor=monitoring(every=2))
    changed.train()
    assert changed.said == "new run 'some 2': the monitor's every was 1, now 2"


def test_data_of_another_encoder_is_other_data(root):
    data = tiny_data(3, held_out=2)
    session(steps=2, data=data).train()
    first = dataclasses.replace(data.training[0], latent=data.training[0].latent * 1.001)
    session(steps=2, data=dataclasses.replace(data, training=(first, *data.training[1:]))).train()
    assert names(root) == ["some"]  # a GPU may be that inexact
    first = dataclasses.replace(first, latent=first.latent * 1.1)
    other = session(steps=2, data=dataclasses.replace(data, training=(first, *data.training[1:])))
    other.train()
    assert "encoded by another CLIP or VAE" in other.said


def encoded_otherwise(kind: str) -> PersonalData:
    """Change one encoding by a tenth, where all others are a hundred times as large."""
    data = tiny_data(2, prior=1, held_out=1)
    group, _, part = kind.partition(" ")
    if group == "empty":
        return replace(data, empty=replace(data.empty, context=data.empty.context * 1.1))
    (first, *rest), name = getattr(data, group), {"text": "context"}.get(part, part)
    return replace(data, **{group: (replace(first, **{name: getattr(first, name) * 1.1}), *rest)})


def loud(data: PersonalData, but: str) -> PersonalData:
    """Let every encoding but one be a hundred times as large."""
    group, _, part = but.partition(" ")

    def louder(kind: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if (kind, name) == (group, part) else 100 * tensor

    groups = {
        kind: tuple(
            replace(
                e,
                latent=louder(kind, "latent", e.latent),
                context=louder(kind, "text", e.context),
            )
            for e in getattr(data, kind)
        )
        for kind in ("training", "held_out", "prior")
    }
    empty = replace(data.empty, context=louder("empty", "text", data.empty.context))
    return replace(data, **groups, empty=empty)


KINDS = [
    "empty text",
    *(f"{g} {p}" for g in ("training", "held_out", "prior") for p in ("latent", "text")),
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_encoding_is_compared_by_its_own_size(kind):
    plain = sketch(loud(tiny_data(2, prior=1, held_out=1), kind))
    other = sketch(loud(encoded_otherwise(kind), kind))
    assert near(plain, json.loads(json.dumps(plain))) and not near(plain, other)


def test_a_sketch_of_an_older_run_is_of_the_first_picture():
    data = tiny_data(2)
    first = data.training[0]
    latent, text = first.latent.flatten()[::16], first.context.flatten()[::14][:16]
    old = [round(float(number), 4) for number in (*latent, *text)]
    assert near(old, sketch(data)) and not near(old, sketch(encoded_otherwise("training latent")))
    assert near(old, sketch(encoded_otherwise("empty text")))


def rewrite(root: Path, **values) -> None:
    """Change what run.json says; None: leave it out."""
    path = root / "some" / "run.json"
    facts = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in facts.items() if v is not None}))


def test_a_run_in_another_precision_is_another_run(root):
    session(steps=2, precision="auto").train()
    rewrite(root, computed_in="bf16")
    again = session(steps=2, precision="auto")
    again.train()
    assert again.said == (
        "new run 'some 2': the base was in 'bf16', now in 'fp32' ('precision' auto)"
    )
    asked = session(steps=2, precision="fp32")
    assert asked.train() and asked.said == "new run 'some 3': precision was 'auto', now 'fp32'"


def test_a_run_of_before_all_that_was_noted_is_the_same_run(root):
    session(steps=2, monitor=monitoring()).train()
    base = json.loads((root / "some" / "run.json").read_text())["base"]
    monitor = json.loads((root / "some" / "run.json").read_text())["monitor"]
    old = {name: base[name] for name in ("family", "geometry", "weights", "patches")}
    assert monitor.pop("held_out_caption") == ""
    rewrite(root, base=old, monitor=monitor, computed_in=None, versions=None, encoded=None)
    again = session(steps=2, monitor=monitoring())
    again.train()
    assert again.said.startswith("run 'some' finished before")


def test_the_caption_of_held_out_pictures_is_part_of_a_run(root):
    told = Wording("a zib", noise(7, WIDTH))
    session(steps=2, monitor=monitoring()).train()
    other = session(steps=2, monitor=replace(monitoring(), held_out_text=told))
    other.train()
    assert other.said == "new run 'some 2': the monitor's held_out_caption was '', now 'a zib'"


def test_going_on_with_another_version_is_said(root, monkeypatch):
    cancelled(monkeypatch, at=2, steps=3)
    facts = json.loads((root / "some" / "run.json").read_text())
    assert facts["versions"] == versions() and versions()["torch"] == torch.__version__
    monkeypatch.setattr(node, "versions", lambda: versions() | {"torch": "99.0"})
    again = session(steps=3)
    again.train()
    assert again.said == (
        "run 'some' resumed at step 2, with other versions: "
        f"torch was {torch.__version__}, now 99.0"
    )


LIES = {
    "settings": 7,
    "base": ["x"],
    "encoded": {"training latent": 3},
    "monitor": "none",
    "dataset": 7,
    "data": {"a": []},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_run_whose_facts_are_no_facts_does_not_block_its_name(root, lie):
    session(steps=1).train()
    rewrite(root, **({"data": ""} if lie == "dataset" else {}), **{lie: LIES[lie]})
    again = session(steps=1)
    again.train()
    assert again.said.startswith("new run 'some 2': ")
    back = session(steps=1)
    assert back.train() and back.said.startswith("run 'some 2' finished before")


def test_a_run_that_may_not_be_read_does_not_block_its_name(root):
    session(steps=1).train()
    forbidden = root / "some"
    header = json.loads((forbidden / "run.json").read_text())
    root.chmod(0o755)
    forbidden.chmod(0o000)
    try:
        for parent in (p for p in root.parents if p.name.startswith(("pytest-", "popen-"))):
            parent.chmod(0o755)

        def look() -> str:
            as_nobody()
            return str(find(root, "some", header, {}))

        assert told_by_child(look) == str(Found())
        forbidden.chmod(0o755)
        (forbidden / "history.jsonl").chmod(0o000)
        assert "'some' can not be read (Permission denied)" in told_by_child(look)
    finally:
        forbidden.chmod(0o755)


def test_a_run_from_before_there_was_a_setting_is_the_same_run(root):
    session(steps=2).train()
    path = root / "some" / "run.json"
    path.write_text(path.read_text().replace('"non_finite": "skip"', '"nothing": 0'), "utf-8")
    changed = session(steps=2)
    changed.train()
    assert "nothing was 0, now not set" in changed.said and "non_finite" not in changed.said


@pytest.mark.parametrize("lost", ["state.safetensors", "history.jsonl"])
def test_a_run_that_can_not_go_on_leaves_its_name_and_says_why(root, monkeypatch, lost):
    cancelled(monkeypatch, at=2, steps=3)
    (root / "some" / lost).write_bytes(b"")
    again = session(steps=3)
    again.train()
    if lost == "history.jsonl":  # the state is enough
        assert "resumed at step 2" in again.said
    else:
        assert again.said.startswith("new run 'some 2': 'some' has a state that can not be read")


@pytest.mark.parametrize("link", [".lock", "history.jsonl", "samples", "samples/000001-0.png"])
def test_a_run_is_not_written_through_a_link_that_leads_out_of_it(root, monkeypatch, link):
    """Whoever made the link would have the training overwrite a file of theirs."""
    cancelled(monkeypatch, at=2, steps=3)
    path, outside = root / "some" / link, root.with_name("outside")
    outside.mkdir(exist_ok=True)
    (outside / "file").write_text("precious")
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(outside if link == "samples" else outside / "file")
    again = session(steps=3)
    again.train()
    said = f"'some' has {path.name}, a link that leads out of its folder"
    assert again.said == f"new run 'some 2': {said}"
    assert [p.name for p in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == "precious"


def test_a_link_that_stays_inside_its_run_is_no_obstacle(root, monkeypatch):
    cancelled(monkeypatch, at=2, steps=3)
    folder = root / "some"
    (folder / "history.jsonl").rename(folder / "kept.jsonl")
    (folder / "history.jsonl").symlink_to(folder / "kept.jsonl")
    again = session(steps=3)
    again.train()
    assert again.said == "run 'some' resumed at step 2"


@pytest.mark.parametrize("room", [0, 10, 1000], ids=lambda room: f"{room} bytes")
def test_a_disk_that_is_full_in_the_middle_of_a_run_takes_nothing_of_it(root, monkeypatch, room):
    """With room for no line of the history, for half a line, and for some lines, but no state."""
    how = {"monitor": monitoring(every=2), "steps": 6}
    undisturbed = session("whole", **how).train()
    history = root / "some" / "history.jsonl"

    def fill(text: str) -> None:
        if text.startswith("step 3 "):
            limited(history.stat().st_size + room)

    show(monkeypatch, fill)
    told = told_by_child(lambda: session(**how).train())
    assert "File too large" in told and not list(root.rglob(".*.tmp"))
    show(monkeypatch)
    again = session(**how)
    learned = again.train()
    assert again.said == "run 'some' resumed at step 2"
    assert outcome(Run(root / "some"), learned) == outcome(Run(root / "whole"), undisturbed)


def test_a_run_whose_folder_is_read_only_says_so_and_goes_on_later(root, monkeypatch):
    cancelled(monkeypatch, at=2, steps=3)
    run, opened = Run(root / "some"), [root, *root.parents]
    for folder in (f for f in opened if f.name.startswith(("pytest-", "popen-", "test_"))):
        folder.chmod(0o755)
    run.folder.chmod(0o555)
    try:
        told = told_by_child(lambda: (as_nobody(), run.claim()))
    finally:
        run.folder.chmod(0o755)
    problem = "is 'some', whose folder can not be written (Permission denied)."
    assert told == f"InputError: 'name' {problem}"
    again = session(steps=3)
    again.train()
    assert again.said == "run 'some' resumed at step 2"


def test_nothing_of_one_run_leaks_into_the_next(root):
    """Every method, then all of them again the other way round, each behind another one."""

    def train_all(order, place: str) -> dict[str, tuple]:
        runs = {method: f"{method} {place}" for method in order}
        trained = {m: session(name, method=m, steps=2).train() for m, name in runs.items()}
        return {m: outcome(Run(root / runs[m]), learned) for m, learned in trained.items()}

    there = train_all(METHODS, "there")
    assert train_all(reversed(METHODS), "back") == there


def test_a_batch_above_the_set_is_told(root):
    large = session(data=tiny_data(3), batch_size=9, steps=1)
    assert "Every picture was shown 3.0 times a step: 'batch_size' is 9" in large.summary(
        large.train()
    )


def test_a_result_that_is_gone_is_trained_again(root):
    session(steps=2).train()
    (root / "some" / "last.safetensors").unlink()
    again = session(steps=2)
    again.train()
    assert names(root) == ["some", "some 2"] and "run 'some' has: none" in again.said


def test_a_run_that_another_process_trains_is_left_alone(root, monkeypatch):
    cancelled(monkeypatch, at=2, steps=3)
    claim = Run(root / "some").claim()
    before = {p.name: p.read_bytes() for p in (root / "some").iterdir()}
    other = session(steps=3)
    other.train()
    assert other.said == "new run 'some 2': 'some' is being trained by another ComfyUI"
    assert {p.name: p.read_bytes() for p in (root / "some").iterdir()} == before
    claim.release()
    back = session(steps=3)
    back.train()
    assert back.said.startswith("run 'some 2' finished before")


def test_a_new_run_that_another_process_takes_first_is_not_trained_beside_it(root, monkeypatch):
    create, claims = Run.create, []

    def created(*given, **more) -> Run:
        run = create(*given, **more)
        claims.append(run.claim())
        return run

    monkeypatch.setattr(Run, "create", created)
    monkeypatch.setattr(node, "A_WHILE", 0.0)
    with pytest.raises(InputError, match="'name' is 'some', a new run that another ComfyUI has"):
        session(steps=2).train()
    assert not (root / "some" / "history.jsonl").exists()
    claims[0].release()


def test_on_a_disk_without_locks_it_trains_and_says_so(root, monkeypatch):
    without_locks(monkeypatch)
    asked = session(steps=2)
    assert "This disk knows no locks: let no other ComfyUI" in asked.summary(asked.train())
    assert Run(root / "some").ended() == "finished"


def test_the_losses_of_all_parts_come_out(root, monkeypatch):
    whole = session("whole", steps=6)
    whole.train()
    cancelled(monkeypatch, at=3, name="parts", steps=6)
    with open(root / "parts" / "history.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 1.0, "learning_rate": 1}\n{"step": 5, "lo')  # lost steps
    parts = session("parts", steps=6)
    parts.train()
    assert parts.losses == whole.losses and len(parts.losses) == 6
    assert [line["step"] for line in Run(root / "parts").history()] == [1, 2, 3, 4, 5, 6, 6]


def test_the_best_of_the_steps_that_are_left_is_best_again(root, monkeypatch):
    """Killed after an evaluation whose state was not written: its checkpoint is not the best."""
    how = {"monitor": monitoring(every=1), "learning_rate": 1e-3, "steps": 6}
    with monkeypatch.context() as patch:
        patch.setattr(node.Watch, "_state_is_due", lambda self, step: step == 2)
        patch.setattr(node.Watch, "rescue", lambda *_: None)  # as kill -9 does it
        cancelled(patch, at=4, **how)
    run = Run(root / "some")
    assert State.load(run.state).done.index == 2 and run.load("best").header.step == 4
    cancelled(monkeypatch, at=2, **how)
    assert run.load("best").header.step == 2 == run.history()[-1]["best_step"]
    learned = session(**how).train()
    fresh = session("fresh", **how).train()
    assert outcome(run, learned)[:4] == outcome(Run(root / "fresh"), fresh)[:4]
