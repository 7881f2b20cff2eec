"""Checkpoints of every form into the model, held against transformers; and what is refused, with what words."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2LMHeadModel

from predictor.checkpoints import load
from predictor.checkpoints.load import free_bytes, load_gpt2, read_config, weight_bytes
from predictor.checkpoints.source import resolve
from predictor.checkpoints.tensors import TensorFiles, _ReadAhead
from predictor.errors import CheckpointError, LoadCancelled, NotEnoughMemory
from predictor.model.config import parse_config
from predictor.model.gpt2 import GPT2, Rows, Span
from tests.conftest import left_out, tiny_model

CPU = torch.device("cpu")
IDS = [5, 0, 17, 200, 5, 5, 99, 276, 31, 42]


def logits_of(model: GPT2, ids: list[int] = IDS) -> Tensor:
    """The logits after each of `ids`, [T, V], in one prefill."""
    rows = Rows(ids, [Span(0, len(ids), 0, len(ids))], list(range(len(ids))))
    return model.forward(rows, model.new_kv(len(ids)))


@torch.no_grad()
def their_logits(model: GPT2LMHeadModel, ids: list[int] = IDS) -> Tensor:
    return model(torch.tensor([ids])).logits[0]


def assert_same_logits(folder: Path, theirs: GPT2LMHeadModel) -> None:
    ours = logits_of(load_gpt2(folder, torch.float32, CPU))
    assert (ours - their_logits(theirs)).abs().max() <= 1e-4


@pytest.fixture(scope="module")
def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """The tiny model's tensors under their names in the file."""
    return load_file(checkpoint / "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path, checkpoint: Path) -> Path:
    """A folder with the tiny model's config.json, for weights of the test's own."""
    shutil.copy(checkpoint / "config.json", tmp_path)
    return tmp_path


def refusal(folder: Path, kind: type[CheckpointError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        load_gpt2(folder, torch.float32, CPU)
    return str(caught.value)


# What loads.


def test_one_safetensors_file_gives_transformers_logits(checkpoint: Path, oracle: GPT2LMHeadModel) -> None:
    assert_same_logits(checkpoint, oracle)


def test_sharded_safetensors_give_transformers_logits(tmp_path: Path, oracle: GPT2LMHeadModel) -> None:
    oracle.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_logits(tmp_path, oracle)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_pytorch_model_bin_gives_transformers_logits(folder: Path, oracle: GPT2LMHeadModel, zipped: bool) -> None:
    # As transformers 2-4 wrote it: the output matrix is there too, tied to the token table.
    torch.save(oracle.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_same_logits(folder, oracle)


def save_bin_shards(folder: Path, tensors: dict[str, Tensor], zipped: bool = True) -> dict[str, str]:
    names = list(tensors)
    half = len(names) // 2
    weight_map = {}
    for place, part in enumerate((names[:half], names[half:]), start=1):
        file = f"pytorch_model-{place:05d}-of-00002.bin"
        shard = {name: tensors[name].clone() for name in part}
        torch.save(shard, folder / file, _use_new_zipfile_serialization=zipped)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_sharded_pytorch_model_bin_gives_transformers_logits(
    folder: Path, oracle: GPT2LMHeadModel, tensors: dict[str, Tensor], zipped: bool
) -> None:
    save_bin_shards(folder, tensors, zipped)
    assert_same_logits(folder, oracle)


@pytest.mark.parametrize("prefix", ["", "transformer.", "model.transformer.", "module.transformer."])
def test_names_load_with_and_without_a_prefix(
    folder: Path, oracle: GPT2LMHeadModel, tensors: dict[str, Tensor], prefix: str
) -> None:
    # openai-community/gpt2 has none; a saved GPT2LMHeadModel has "transformer.".
    renamed = {prefix + name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors")
    assert_same_logits(folder, oracle)


def test_tensors_the_model_does_not_need_are_ignored(
    folder: Path, oracle: GPT2LMHeadModel, tensors: dict[str, Tensor]
) -> None:
    # OpenAI's own upload carries the causal mask of every layer.
    extra = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    save_file(tensors | extra, folder / "model.safetensors")
    assert_same_logits(folder, oracle)


def test_safetensors_come_before_a_pickle(folder: Path, oracle: GPT2LMHeadModel, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert_same_logits(folder, oracle)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_half_precision_file_widens_to_fp32(
    folder: Path, tensors: dict[str, Tensor], stored: torch.dtype, file: str
) -> None:
    narrow = {name: tensor.to(stored) for name, tensor in tensors.items()}
    (save_file if file.endswith("safetensors") else torch.save)(narrow, folder / file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": str(stored).removeprefix("torch.")}))
    theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    assert_same_logits(folder, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fp32_file_narrows_to_the_dtype_asked_for(
    checkpoint: Path, tensors: dict[str, Tensor], dtype: torch.dtype
) -> None:
    model = load_gpt2(checkpoint, dtype, CPU)
    assert model.dtype == dtype
    # Close to fp32 on the same, rounded weights: what is left is the arithmetic of activations.
    rounded = tiny_model()
    rounded.load_state_dict({name: tensor.to(dtype).float() for name, tensor in tensors.items()}, strict=False)
    theirs = their_logits(rounded)
    ours = logits_of(model)
    assert ours.dtype == torch.float32
    assert torch.isfinite(ours).all()
    tolerance = theirs.abs().max() * (0.01 if dtype == torch.float16 else 0.05)
    assert (ours - theirs).abs().max() <= tolerance


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False},
        {"activation_function": "gelu"},
        {"activation_function": "relu", "n_inner": 96},
        {"scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 1e-3},
        {"scale_attn_weights": False},
        {"n_layer": 1, "n_head": 1},
    ],
    ids=str,
)
def test_every_variant_of_gpt2_gives_transformers_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    theirs = tiny_model(1, **changes)
    theirs.save_pretrained(tmp_path)
    assert_same_logits(tmp_path, theirs)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_tensors_that_share_memory_in_a_pickle_are_each_read_right(tmp_path: Path, zipped: bool) -> None:
    # An output matrix stored as the token table itself, by a config that calls them untied.
    theirs = tiny_model(tie_word_embeddings=False)
    theirs.lm_head.weight = theirs.transformer.wte.weight
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_same_logits(tmp_path, theirs)


def test_a_pickled_tensor_that_is_not_contiguous_is_read_right(
    folder: Path, oracle: GPT2LMHeadModel, tensors: dict[str, Tensor]
) -> None:
    transposed = {
        name: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor for name, tensor in tensors.items()
    }
    torch.save(transposed, folder / "pytorch_model.bin")
    assert_same_logits(folder, oracle)


LOAD_EXPANDED = """
import sys, torch
from pathlib import Path
from predictor.checkpoints.load import load_gpt2
from predictor.errors import CheckpointError
bystander = torch.ones(20_000_000)
try:
    load_gpt2(Path(sys.argv[1]), torch.float32, torch.device("cpu"))
except CheckpointError as error:
    print("refused", error)
assert int(bystander.sum()) == 20_000_000
print("alive")
"""


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_a_pickled_tensor_larger_than_its_memory_breaks_nothing(
    folder: Path, tensors: dict[str, Tensor], zipped: bool
) -> None:
    # expand() makes a tensor of 16 MiB on 4 bytes of storage; a file can say that of any tensor.
    config = json.loads((folder / "config.json").read_text()) | {"n_positions": 65536}
    (folder / "config.json").write_text(json.dumps(config))
    wide = tensors | {"transformer.wpe.weight": torch.zeros(1).expand(65536, 64)}
    torch.save(wide, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    done = run_python(LOAD_EXPANDED, str(folder))
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-500:]}"
    assert done.stdout.endswith("alive\n")


def test_the_model_stands_by_itself_once_the_files_are_gone(tmp_path: Path, oracle: GPT2LMHeadModel) -> None:
    oracle.save_pretrained(tmp_path)
    model = load_gpt2(tmp_path, torch.float32, CPU)
    (tmp_path / "model.safetensors").write_bytes(b"overwritten")
    assert (logits_of(model) - their_logits(oracle)).abs().max() <= 1e-4


def test_loading_leaves_the_files_as_they_were(checkpoint: Path) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    load_gpt2(checkpoint, torch.float16, CPU)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_progress_ends_at_the_number_of_parameters(checkpoint: Path) -> None:
    told: list[tuple[int, int]] = []
    model = load_gpt2(checkpoint, torch.float32, CPU, progress=lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (model.config.parameters, model.config.parameters)


def test_a_load_told_to_stop_stops_at_the_next_tensor(checkpoint: Path) -> None:
    stop, fetched = threading.Event(), []

    def progress(done: int, total: int) -> None:
        fetched.append(done)
        if len(fetched) == 3:
            stop.set()

    with pytest.raises(LoadCancelled):
        load_gpt2(checkpoint, torch.float32, CPU, progress=progress, stop=stop)
    assert len(fetched) == 3


# What is refused.


def test_a_source_that_does_not_exist_is_named(tmp_path: Path) -> None:
    for source in (str(tmp_path / "nothing"), "./nothing", "../nothing", "~/no/such/folder", "a/b/c"):
        with pytest.raises(CheckpointError, match="does not exist") as caught:
            resolve(source)
        assert source in str(caught.value)


def test_a_source_that_is_a_file_is_refused_with_what_to_name(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a file; name the folder"):
        resolve(str(checkpoint / "model.safetensors"))


def test_a_folder_is_its_own_source_and_has_no_revision(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(checkpoint)) == checkpoint
    monkeypatch.chdir(checkpoint.parent)
    assert resolve(checkpoint.name).samefile(checkpoint)
    with pytest.raises(CheckpointError, match="--revision"):
        resolve(str(checkpoint), "main")


def test_a_folder_without_config_is_refused_with_a_question(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert "no config.json" in message
    assert str(tmp_path) in message


@pytest.mark.parametrize("text", ["{", "", "{'a': 1}", "\x80"])
def test_a_config_that_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    message = refusal(tmp_path)
    assert "config.json" in message
    assert "not valid JSON" in message


@pytest.mark.parametrize("text", ["[]", "5", '"gpt2"', "null"])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert "not a JSON object" in refusal(tmp_path)


def test_a_folder_without_weights_is_refused_with_what_is_expected(folder: Path) -> None:
    message = refusal(folder)
    assert "no weights" in message
    assert "model.safetensors" in message
    assert "pytorch_model.bin" in message


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_another_architecture_is_refused_before_weights_are_looked_for(folder: Path) -> None:
    change_config(folder, model_type="llama")
    message = refusal(folder)
    assert "'llama'" in message
    assert "--backend transformers" in message


def test_an_unsupported_activation_is_refused(folder: Path) -> None:
    change_config(folder, activation_function="swish")
    message = refusal(folder)
    assert "'swish'" in message
    assert "gelu_new" in message


@pytest.mark.parametrize("name", ["wte.weight", "wpe.weight", "h.1.attn.c_attn.bias", "ln_f.weight"])
def test_a_missing_tensor_is_named(folder: Path, tensors: dict[str, Tensor], name: str) -> None:
    save_file({k: v for k, v in tensors.items() if k != f"transformer.{name}"}, folder / "model.safetensors")
    assert refusal(folder) == f"the checkpoint lacks the tensor {name}"


def test_an_untied_output_matrix_that_is_missing_is_named(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors")
    change_config(folder, tie_word_embeddings=False)
    assert "lm_head.weight" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("wte.weight", (276, 64)), ("h.0.mlp.c_fc.weight", (256, 64)), ("h.1.ln_1.bias", (1, 64)), ("wpe.weight", (64,))],
)
def test_a_wrong_shape_is_told_with_the_right_one(
    folder: Path, tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]
) -> None:
    right = tuple(tensors[f"transformer.{name}"].shape)
    save_file(tensors | {f"transformer.{name}": torch.zeros(shape)}, folder / "model.safetensors")
    message = refusal(folder)
    assert name in message
    assert str(shape) in message
    assert str(right) in message


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-1],
        lambda raw: raw + b"x",
        lambda raw: b"",
        lambda raw: b"\xff" * 8 + raw[8:],
        lambda raw: raw[:8] + b"x" + raw[9:],
        lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n",
    ],
    ids=["half", "a byte less", "a byte more", "empty", "header length", "header", "git-lfs pointer"],
)
def test_a_damaged_safetensors_file_is_named(folder: Path, checkpoint: Path, damage: Callable[[bytes], bytes]) -> None:
    (folder / "model.safetensors").write_bytes(damage((checkpoint / "model.safetensors").read_bytes()))
    message = refusal(folder)
    assert "model.safetensors" in message
    assert "damaged" in message


@pytest.fixture(scope="module")
def pickles(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> dict[bool, bytes]:
    """The tiny model as a pytorch_model.bin, by whether it is a zip."""
    path = tmp_path_factory.mktemp("bin") / "pytorch_model.bin"
    raw = {}
    for zipped in (True, False):
        torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
        raw[zipped] = path.read_bytes()
    return raw


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
@pytest.mark.parametrize("cut", [0, 1, 2, 100, 5_000, -1, -10_000])
def test_a_pytorch_model_bin_cut_short_is_named(
    folder: Path, pickles: dict[bool, bytes], zipped: bool, cut: int
) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickles[zipped][:cut])
    assert "pytorch_model.bin" in refusal(folder)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of odd versions and types it reads
@given(data=st.data(), zipped=st.booleans())
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_pytorch_model_bin_is_read_or_refused_and_never_an_accident(
    folder: Path, pickles: dict[bool, bytes], data: st.DataObject, zipped: bool
) -> None:
    raw = bytearray(pickles[zipped])
    # The front of the file holds the pickle; what comes after is numbers.
    for place, byte in data.draw(st.lists(st.tuples(st.integers(0, 2_500), st.integers(0, 255)), max_size=4)):
        raw[place] = byte
    (folder / "pytorch_model.bin").write_bytes(bytes(raw))
    said = "pytorch_model.bin"
    try:
        with TensorFiles(folder):
            pass
    except CheckpointError as error:
        said = str(error)
    assert "pytorch_model.bin" in said
    assert "\n" not in said


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(raw=st.binary(max_size=60))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_that_are_no_checkpoint_are_refused_by_the_files_name(folder: Path, raw: bytes) -> None:
    (folder / "pytorch_model.bin").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        TensorFiles(folder)


def test_a_git_lfs_pointer_is_not_called_a_pickle_with_code(folder: Path) -> None:
    # What `git clone` of a hub repository leaves without git-lfs: the commonest damaged file there is.
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548118077\n"
    (folder / "pytorch_model.bin").write_text(pointer)
    message = refusal(folder)
    assert "pytorch_model.bin" in message
    assert "code" not in message


class Attack:
    """Runs a shell command when unpickled."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._proof}",)


@pytest.mark.parametrize("how", ["zip", "old format", "plain pickle"])
def test_a_pickle_with_code_is_refused_and_the_code_does_not_run(
    folder: Path, tensors: dict[str, Tensor], tmp_path: Path, how: str
) -> None:
    proof = tmp_path / "ran"
    holds_code = tensors | {"extra": Attack(proof)}
    if how == "plain pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"extra": Attack(proof)}, protocol=2))
    else:
        torch.save(holds_code, folder / "pytorch_model.bin", _use_new_zipfile_serialization=how == "zip")
    message = refusal(folder)
    assert not proof.exists()
    assert "pytorch_model.bin" in message
    assert "code" in message
    assert "safetensors" in message
    # The same file does run it where nobody guards: the attack is a real one.
    if how == "plain pickle":
        pickle.loads((folder / "pytorch_model.bin").read_bytes())
        assert proof.exists()


def test_a_pickle_that_is_no_dictionary_is_refused(folder: Path) -> None:
    torch.save([torch.zeros(3)], folder / "pytorch_model.bin")
    assert "no dictionary of tensors" in refusal(folder)


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/shard", "..", ".", "", "absent"])
def test_an_index_that_names_a_file_outside_its_folder_is_refused(folder: Path, index: str, name: str) -> None:
    (folder.parent / "outside").write_bytes(b"")
    (folder / "sub").mkdir()
    (folder / "sub" / "shard").write_bytes(b"")
    (folder / index).write_text(json.dumps({"weight_map": {"wte.weight": name}}))
    message = refusal(folder)
    assert f"{index} names {name}" in message
    assert "not in the folder" in message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "5",
        "null",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": "x"}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": null}}',
        '{"weight_map": {"a": ["x"]}}',
        '{"weight_map": {"a": 1, "b": "x"}}',
    ],
)
def test_an_index_that_is_none_is_refused_by_name(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refusal(folder)


def test_a_shard_that_is_missing_is_named(folder: Path, tensors: dict[str, Tensor]) -> None:
    weight_map = save_bin_shards(folder, tensors)
    lost = max(weight_map.values())
    (folder / lost).unlink()
    assert lost in refusal(folder)


def test_a_tensor_no_shard_holds_is_named(folder: Path, tensors: dict[str, Tensor]) -> None:
    shard = "model-00001-of-00001.safetensors"
    save_file({k: v for k, v in tensors.items() if k != "transformer.ln_f.bias"}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard)}))
    assert "ln_f.bias" in refusal(folder)


# Memory.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_too_little_memory_is_told_with_what_is_needed_and_free(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    change = {"n_layer": 48, "n_embd": 1600, "n_head": 25, "vocab_size": 50257, "n_positions": 1024}
    config = parse_config(read_config(checkpoint) | change)
    weights = weight_bytes(config, dtype, CPU)
    monkeypatch.setattr(load, "free_bytes", lambda device: 3 * 2**30)
    monkeypatch.setattr(load, "read_config", lambda folder: read_config(checkpoint) | change)
    with pytest.raises(NotEnoughMemory) as caught:
        load_gpt2(checkpoint, dtype, CPU, kv_bytes=2**30)
    message = str(caught.value)
    needed = weights + 2**30 + 512 * 2**20
    assert f"needs {needed / 2**30:.2f} GiB on cpu" in message
    assert f"{weights / 2**30:.2f} GiB of weights in {str(dtype).removeprefix('torch.')}" in message
    assert "1.00 GiB of KV" in message
    assert "3.00 GiB are free" in message
    assert "--dtype" in message
    assert "--kv-memory-mib" in message


def test_just_enough_memory_is_enough(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(read_config(checkpoint))
    exact = weight_bytes(config, torch.float32, CPU) + 4096 + 512 * 2**20
    monkeypatch.setattr(load, "free_bytes", lambda device: exact)
    load_gpt2(checkpoint, torch.float32, CPU, kv_bytes=4096)
    with pytest.raises(NotEnoughMemory):
        load_gpt2(checkpoint, torch.float32, CPU, kv_bytes=4097)


def test_too_little_memory_is_found_before_weights_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "free_bytes", lambda device: 0)
    refusal(folder, NotEnoughMemory)


def test_free_memory_is_what_the_system_says_at_most() -> None:
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert 0 < free_bytes(CPU) <= int(meminfo["MemTotal"].split()[0]) * 1024


MEASURE = """
import sys, torch
from pathlib import Path
from predictor.checkpoints.load import load_gpt2

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

# What the first load costs once (libraries, threads) is no part of the weights.
load_gpt2(Path(sys.argv[3]), getattr(torch, sys.argv[2]), torch.device("cpu"))
before = status("VmRSS:")
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
model = load_gpt2(Path(sys.argv[1]), getattr(torch, sys.argv[2]), torch.device("cpu"))
weights = model.config.parameters * model.dtype.itemsize
print((status("VmHWM:") - before) / weights, (status("VmRSS:") - before) / weights)
"""


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=30)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A random checkpoint of about 200 MB in fp32, as safetensors, as .bin, and as .bin of the old format.

    Wide layers and a small token table: on CPU in fp32 the output matrix is packed apart from the table.
    """
    width, layers, vocabulary, context = 1024, 4, 300, 128
    config = {
        "model_type": "gpt2", "n_embd": width, "n_layer": layers, "n_head": 16, "vocab_size": vocabulary,
        "n_positions": context,
    }  # fmt: skip
    shapes = {"wte.weight": (vocabulary, width), "wpe.weight": (context, width)}
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    for layer in range(layers):
        for name, inputs, outputs in (
            ("attn.c_attn", 1, 3), ("attn.c_proj", 1, 1), ("mlp.c_fc", 1, 4), ("mlp.c_proj", 4, 1),
        ):  # fmt: skip
            shapes[f"h.{layer}.{name}.weight"] = (inputs * width, outputs * width)
            shapes[f"h.{layer}.{name}.bias"] = (outputs * width,)
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{layer}.{name}.weight": (width,), f"h.{layer}.{name}.bias": (width,)}
    tensors = {f"transformer.{name}": torch.rand(shape) for name, shape in shapes.items()}
    base = tmp_path_factory.mktemp("large")
    folders = {name: base / name for name in ("safetensors", "bin", "old bin")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folders["safetensors"] / "model.safetensors")
    torch.save(tensors, folders["bin"] / "pytorch_model.bin")
    torch.save(tensors, folders["old bin"] / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    del tensors
    yield folders
    shutil.rmtree(base)


@pytest.mark.parametrize(
    ("form", "dtype", "limit"),
    [
        ("safetensors", "float32", 1.35),
        ("bin", "float32", 1.35),
        # Half the weights, and the largest tensor is a sixth of them while it is still wide.
        ("safetensors", "float16", 1.35),
        # The old format cannot be mapped: it is read whole.
        ("old bin", "float32", 1.5),
    ],
)
def test_peak_memory_of_loading_stays_near_one_copy_of_the_weights(
    large: dict[str, Path],
    checkpoint: Path,
    form: str,
    dtype: str,
    limit: float,
    record_property: Callable[[str, object], None],
) -> None:
    done = run_python(MEASURE, str(large[form]), dtype, str(checkpoint))
    assert done.returncode == 0, done.stderr
    peak, after = map(float, done.stdout.split())
    record_property("peak_over_weights", peak)
    print(f"{form}, {dtype}: peak {peak:.3f} x the weights, after {after:.3f} x")
    assert peak < limit


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 2**63),
        ({"memory.max": "max", "memory.current": "5", "memory.stat": "inactive_file 1"}, 2**63),
        (
            {
                "memory.max": "1000",
                "memory.current": "900",
                "memory.stat": "anon 300\ninactive_file 400\nactive_file 150",
            },
            650,
        ),
        (
            {
                "memory/memory.limit_in_bytes": "1000",
                "memory/memory.usage_in_bytes": "900",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 500\ntotal_active_file 0",
            },
            600,
        ),
    ],
    ids=["no container", "no limit", "version 2", "version 1"],
)
def test_the_page_cache_of_a_container_is_free_memory(tmp_path: Path, files: dict[str, str], free: int) -> None:
    from predictor.checkpoints.load import _container_free_bytes

    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert _container_free_bytes(tmp_path) == free


def test_files_are_read_ahead_of_what_is_fetched_and_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.platform != "linux":
        left_out("only Linux is told what will be read")
    tiny_model().save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    asked: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, length, advice: asked.append(start))
    monkeypatch.setattr(_ReadAhead, "_CHUNK_BYTES", 4096)
    monkeypatch.setattr(_ReadAhead, "_MOST_BYTES", 40960)

    def wait_for(count: int) -> None:
        began = time.monotonic()
        while len(asked) < count:
            assert time.monotonic() - began < 10, f"{len(asked)} of {count} chunks"
            time.sleep(0.005)

    with TensorFiles(tmp_path) as files:
        wait_for(11)
        time.sleep(0.05)
        assert asked == list(range(0, 45056, 4096)), "further than it may"
        files._ahead.fetched_bytes = size
        wait_for(-(-size // 4096))
        assert asked == list(range(0, size, 4096))
    with TensorFiles(tmp_path):
        pass
    assert not any(thread.name == "read-ahead" for thread in threading.enumerate())
