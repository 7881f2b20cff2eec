"""Training: what a run leaves behind, that it can be interrupted anywhere, and what it refuses."""

from __future__ import annotations

import csv
import dataclasses
import json
import pickle
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from predictor.errors import CheckpointError, ConfigurationError, InvalidRequest
from predictor.training import data, state
from predictor.training import finetune as loop
from predictor.training.finetune import FinetuneOptions, FinetuneReport, finetune
from predictor.training.optimizer import learning_rate, make_optimizer

BARD = Path(__file__).parent.parent / "models" / "bard"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    line = "the king of snow rides over the hill and says good night my lord é ☃"
    words = line.split()
    choose = random.Random(0).choice
    lines = [" ".join(choose(words) for _ in range(9)) for _ in range(200)]
    path = tmp_path_factory.mktemp("text") / "play.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def tiny_options(text_file: Path, out: Path, **changes: Any) -> FinetuneOptions:
    tiny: dict[str, Any] = {
        "layers": 2, "heads": 2, "width": 16, "context": 16, "vocabulary": 300, "dropout": 0.1, "steps": 12,
        "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 2, "evaluate_every": 4, "seed": 3, "device": "cpu",
    }  # fmt: skip
    return FinetuneOptions(data=(text_file,), out=out, **(tiny | changes))


@pytest.fixture(scope="module")
def trained(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneReport:
    out = tmp_path_factory.mktemp("trained") / "model"
    return finetune(tiny_options(text_file, out), show_progress=False)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_curve(out: Path) -> list[dict[str, str]]:
    with (out / "loss.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_loss_falls_and_the_curve_has_a_row_per_evaluation(trained: FinetuneReport) -> None:
    rows = read_curve(trained.out)
    assert [row["step"] for row in rows] == ["0", "4", "8", "12"]
    losses = [float(row["validation_loss"]) for row in rows]
    assert losses[-1] < losses[0] - 0.5
    assert rows[0]["train_loss"] == ""
    assert float(rows[-1]["train_loss"]) < float(rows[1]["train_loss"])
    assert (trained.out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_report_counts_and_converts_to_bits_per_byte(trained: FinetuneReport, text_file: Path) -> None:
    characters = text_file.read_text(encoding="utf-8")
    tail = characters[int(len(characters) * 0.9) :]
    assert trained.validation_bytes == len(tail.encode("utf-8"))
    nats = trained.validation_loss * trained.validation_tokens
    assert trained.bits_per_byte == pytest.approx(nats / 0.693147 / trained.validation_bytes, rel=1e-5)
    assert trained.best_step == 12


def test_folder_opens_offline_and_holds_no_training_state(trained: FinetuneReport) -> None:
    names = set(files_of(trained.out))
    assert names >= {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert state.FOLDER not in names
    model = AutoModelForCausalLM.from_pretrained(trained.out, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(trained.out, local_files_only=True)
    assert model.config.vocab_size == len(tokenizer) == 300
    assert model.config.eos_token_id == tokenizer.eos_token_id == 0
    ids = torch.tensor([tokenizer.encode("the king")])
    assert model(ids).logits.shape == (1, ids.shape[1], 300)


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_tokenizer_round_trips_any_text(trained: FinetuneReport, text: str) -> None:
    tokenizer = _tokenizer_of(trained.out)
    assert tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text


def _tokenizer_of(folder: Path, opened: dict[Path, Any] = {}) -> Any:  # noqa: B006 (a cache)
    if folder not in opened:
        opened[folder] = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return opened[folder]


def test_tokenizer_config_names_a_class_that_transformers_4_knows(trained: FinetuneReport) -> None:
    config = json.loads((trained.out / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_same_options_give_the_same_files(trained: FinetuneReport, text_file: Path, tmp_path: Path) -> None:
    again = finetune(tiny_options(text_file, tmp_path / "again"), show_progress=False)
    assert files_of(again.out) == files_of(trained.out)


def test_training_leaves_torch_generator_alone(text_file: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    finetune(tiny_options(text_file, tmp_path / "model", steps=1, warmup_steps=0), show_progress=False)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("last_step", [0, 3, 6, 11])
def test_resumed_run_equals_uninterrupted_bit_for_bit(
    trained: FinetuneReport, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_step: int
) -> None:
    options = tiny_options(text_file, tmp_path / "model")
    interrupt(options, monkeypatch, last_step)
    with pytest.raises(ConfigurationError, match="resume"):
        finetune(options, show_progress=False)
    finetune(dataclasses.replace(options, resume=True), show_progress=False)
    assert files_of(options.out) == files_of(trained.out)


def interrupt(options: FinetuneOptions, monkeypatch: pytest.MonkeyPatch, last_step: int) -> None:
    real_step = loop._step

    def step_or_stop(options: Any, trainee: Any, optimizer: Any, step: int, rate: float) -> float:
        if step == last_step:
            raise KeyboardInterrupt
        return real_step(options, trainee, optimizer, step, rate)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", step_or_stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(options, show_progress=False)


def test_best_checkpoint_is_kept_when_the_last_is_worse(
    trained: FinetuneReport, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_step = loop._step

    def step_that_spoils_the_end(options: Any, trainee: Any, optimizer: Any, step: int, rate: float) -> float:
        loss = real_step(options, trainee, optimizer, step, rate)
        if step == 11:
            with torch.no_grad():
                trainee.model.transformer.wte.weight.mul_(50)
        return loss

    monkeypatch.setattr(loop, "_step", step_that_spoils_the_end)
    report = finetune(tiny_options(text_file, tmp_path / "model"), show_progress=False)
    assert report.best_step == 8
    kept = float(read_curve(report.out)[2]["validation_loss"])
    assert report.validation_loss == pytest.approx(kept, abs=0.02)  # saved weights in fp32, the curve maybe in bf16


def test_resume_with_nothing_to_resume_starts_at_the_beginning(
    trained: FinetuneReport, text_file: Path, tmp_path: Path
) -> None:
    report = finetune(tiny_options(text_file, tmp_path / "model", resume=True), show_progress=False)
    assert files_of(report.out) == files_of(trained.out)


def test_resume_refuses_another_run_and_names_what_differs(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = tiny_options(text_file, tmp_path / "model", resume=True)
    interrupt(options, monkeypatch, 5)
    with pytest.raises(ConfigurationError, match="batch_size was 4 in the interrupted run and is 8 now"):
        finetune(dataclasses.replace(options, batch_size=8), show_progress=False)
    with pytest.raises(ConfigurationError, match="vocabulary was 300"):
        finetune(dataclasses.replace(options, vocabulary=290), show_progress=False)
    other_text = tmp_path / "other.txt"
    other_text.write_text("another play\n" * 100)
    with pytest.raises(ConfigurationError, match="data was"):
        finetune(dataclasses.replace(options, data=(other_text,)), show_progress=False)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("/nonexistent").touch, ())


@pytest.mark.parametrize("content", [b"", b"not a state", pickle.dumps({"model": Bomb()})])
def test_resume_refuses_a_damaged_state_and_runs_no_code_in_it(text_file: Path, tmp_path: Path, content: bytes) -> None:
    options = tiny_options(text_file, tmp_path / "model", resume=True)
    workspace = options.out / state.FOLDER
    workspace.mkdir(parents=True)
    (workspace / state.STATE).write_bytes(content)
    with pytest.raises(CheckpointError, match="not a readable training state"):
        finetune(options, show_progress=False)


def test_write_killed_in_the_middle_leaves_the_previous_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(3, 3)
    optimizer = make_optimizer(model, 0.1)
    identity = {"seed": "3"}
    row = state.Measurement(4, 1e-3, 2.0, 2.5)
    state.save_state(tmp_path, identity, state.Progress([row]), model, optimizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    real_save = torch.save

    def save_half(value: Any, path: Path) -> None:
        real_save(value, path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        raise SystemExit("killed")

    monkeypatch.setattr(torch, "save", save_half)
    with torch.no_grad():
        model.weight.add_(1)
    with pytest.raises(SystemExit):
        state.save_state(tmp_path, identity, state.Progress([row, row]), model, optimizer)

    progress = state.load_state(tmp_path, identity, model, optimizer)
    assert progress.history == [row]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_finished_folder_is_not_overwritten(trained: FinetuneReport, text_file: Path) -> None:
    with pytest.raises(ConfigurationError, match="already holds a model"):
        finetune(tiny_options(text_file, trained.out), show_progress=False)


def test_finetuning_starts_from_the_checkpoint_and_keeps_its_tokenizer(
    trained: FinetuneReport, text_file: Path, tmp_path: Path
) -> None:
    options = FinetuneOptions(
        (text_file,), tmp_path / "tuned", init=str(trained.out), steps=2, batch_size=2, dtype="float16", device="cpu"
    )
    report = finetune(options, show_progress=False)
    tokenizer = (trained.out / "tokenizer.json").read_text(encoding="utf-8")
    assert json.loads((report.out / "tokenizer.json").read_text(encoding="utf-8")) == json.loads(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(report.out, dtype="auto", local_files_only=True)
    assert model.dtype == torch.float16
    first = float(read_curve(report.out)[0]["validation_loss"])
    assert first == pytest.approx(trained.validation_loss, abs=0.02)
    with pytest.raises(InvalidRequest, match="context must be at most 16"):
        finetune(dataclasses.replace(options, out=tmp_path / "x", context=17), show_progress=False)


def test_finetuning_refuses_what_is_not_a_gpt2(text_file: Path, tmp_path: Path) -> None:
    options = FinetuneOptions((text_file,), tmp_path / "out", init=str(tmp_path))
    with pytest.raises(CheckpointError, match="no checkpoint"):
        finetune(options, show_progress=False)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_neox"}))
    with pytest.raises(CheckpointError, match="only gpt2"):
        finetune(options, show_progress=False)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2}))
    with pytest.raises(CheckpointError, match="tokenizer"):
        finetune(options, show_progress=False)


def test_batch_is_a_function_of_seed_and_step() -> None:
    ids = torch.arange(1000)
    inputs, targets = data.training_batch(ids, 16, 8, seed=1, step=5)
    assert inputs.shape == targets.shape == (8, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    data.training_batch(ids, 16, 8, seed=1, step=6)
    assert torch.equal(inputs, data.training_batch(ids, 16, 8, seed=1, step=5)[0])
    assert not torch.equal(inputs, data.training_batch(ids, 16, 8, seed=1, step=6)[0])
    assert not torch.equal(inputs, data.training_batch(ids, 16, 8, seed=2, step=5)[0])


def test_batches_reach_the_first_and_the_last_token() -> None:
    ids = torch.arange(12)
    drawn = [data.training_batch(ids, 4, 8, seed=0, step=step) for step in range(20)]
    assert min(int(inputs.min()) for inputs, _ in drawn) == 0
    assert max(int(targets.max()) for _, targets in drawn) == 11


@pytest.mark.parametrize("length", [2, 5, 16, 17, 33, 40])
def test_validation_predicts_every_token_but_the_first_once(length: int) -> None:
    ids = torch.arange(length)
    targets = torch.cat([targets.flatten() for _, targets in data.validation_batches(ids, 16, 2)])
    assert targets[targets != data.NO_TARGET].tolist() == list(range(1, length))


def test_files_are_split_each_and_joined_by_end_of_text(tmp_path: Path) -> None:
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    paths[0].write_bytes(b"aaaa\r\naaax")
    paths[1].write_text("b" * 18 + "yz")
    text = data.read_text(paths)
    assert text.train == ("aaaa\r\naaa", "b" * 18)
    assert text.validation == ("x", "yz")
    tokenizer = data.train_tokenizer(text.train, 300, 16)
    tokens = data.encode_text(text, tokenizer)
    assert tokenizer.decode(tokens.train) == "aaaa\r\naaa<|endoftext|>" + "b" * 18
    assert tokens.validation_bytes == 3


def test_schedule_warms_up_and_ends_at_a_tenth() -> None:
    rates = [learning_rate(step, 101, 10, 2e-3) for step in range(101)]
    assert rates[0] == pytest.approx(2e-4)
    assert rates[9] == rates[10] == pytest.approx(2e-3)
    assert rates[55] == pytest.approx(1.1e-3)
    assert rates[100] == pytest.approx(2e-4)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(0, 1, 0, 1.0) == 1.0


def test_weight_decay_is_on_matrices_only() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    decayed, plain = make_optimizer(model, 0.3).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert [parameter.dim() for parameter in decayed["params"]] == [2]
    assert [parameter.dim() for parameter in plain["params"]] == [1, 1, 1]


@pytest.mark.parametrize(
    ("param", "changes", "limit"),
    [
        ("layers", {"layers": 0}, "1..96"),
        ("heads", {"heads": 0}, "1..128"),
        ("width", {"width": 15}, "multiple of heads (2)"),
        ("context", {"context": 1}, "2..8,192"),
        ("vocabulary", {"vocabulary": 256}, "257..131,072"),
        ("dropout", {"dropout": 1.0}, "0.0..0.9"),
        ("steps", {"steps": 0}, "1.."),
        ("batch_size", {"batch_size": 0}, "1..4,096"),
        ("learning_rate", {"learning_rate": float("nan")}, "1e-09..1.0"),
        ("warmup_steps", {"warmup_steps": 13}, "at most steps (12)"),
        ("weight_decay", {"weight_decay": -0.1}, "0.0..10.0"),
        ("gradient_clip", {"gradient_clip": 0.0}, "1e-06.."),
        ("evaluate_every", {"evaluate_every": 0}, "1.."),
        ("seed", {"seed": -1}, "0.."),
        ("dtype", {"dtype": "int8"}, "float32, bfloat16, float16"),
        ("precision", {"precision": "float16"}, "auto, float32, bfloat16"),
        ("device", {"device": "tpu"}, "auto, cpu, cuda"),
        ("data", {"data": ()}, "at least 1"),
        ("layers", {"init": "gpt2"}, "from scratch"),
    ],
)
def test_bad_option_is_refused_by_name_and_limit(
    text_file: Path, tmp_path: Path, param: str, changes: dict[str, Any], limit: str
) -> None:
    options = dataclasses.replace(tiny_options(text_file, tmp_path / "model"), **changes)
    with pytest.raises(InvalidRequest) as caught:
        finetune(options, show_progress=False)
    assert caught.value.param == param
    assert param in str(caught.value)
    assert limit in str(caught.value)
    assert not options.out.exists()


def test_out_must_not_be_init(text_file: Path, tmp_path: Path) -> None:
    options = FinetuneOptions((text_file,), tmp_path, init=str(tmp_path))
    with pytest.raises(InvalidRequest, match="out must be another folder than init"):
        finetune(options, show_progress=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        (b"", "at least 2 characters, got 0"),
        (b"good\xff\xfe", "not UTF-8 at byte 4"),
        (b"too short", "at least 17 tokens in its first 90 %"),
    ],
)
def test_bad_data_file_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "data.txt"
    if content is not None:
        path.write_bytes(content)
    options = tiny_options(path, tmp_path / "model")
    with pytest.raises(InvalidRequest, match=message) as caught:
        finetune(options, show_progress=False)
    assert caught.value.param == "data"
    assert not options.out.exists()


def test_missing_matplotlib_is_told_before_training(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigurationError, match=r"pip install gpt2-predictor\[train\]"):
        finetune(tiny_options(text_file, tmp_path / "model"), show_progress=False)


def test_diverging_run_names_the_learning_rate(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_step", lambda *args: float("nan"))
    with pytest.raises(ConfigurationError, match="learning_rate: the loss is nan at step 0"):
        finetune(tiny_options(text_file, tmp_path / "model"), show_progress=False)


def test_unwritable_out_is_refused(text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigurationError, match="out: cannot make"):
        finetune(tiny_options(text_file, tmp_path / "file" / "model"), show_progress=False)


def test_every_option_has_a_line_of_help() -> None:
    for option in dataclasses.fields(FinetuneOptions):
        assert 0 < len(option.metadata["help"]) <= 110
        assert "\n" not in option.metadata["help"]


def test_bundled_model_opens_and_fits_8_mb() -> None:
    names = {path.name for path in BARD.iterdir()}
    assert names >= {"config.json", "tokenizer.json", "model.safetensors", "README.md", "loss.png"}
    assert sum(path.stat().st_size for path in BARD.iterdir()) < 7_900_000
    model = AutoModelForCausalLM.from_pretrained(BARD, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(BARD, local_files_only=True)
    assert model.config.n_positions >= 256
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.decode(tokenizer.encode("To be, or not to be")) == "To be, or not to be"
