"""The command line: what it shows, what it proves about the run, and one sentence for every mistake."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    ByT5Tokenizer,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from streamkernels.cli import main  # noqa: E402
from streamkernels.demo import HoldOn, Utterances, policy_of  # noqa: E402
from streamkernels.integrations.transformers.checkpoint import load_checkpoint  # noqa: E402
from streamkernels.streaming import ReadAll, WaitK  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
LINES = "the meeting is on the twenty third\nof march at five thirty\n"
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": None,
}
CHAT = "{% for m in messages %}<user> {{ m['content'] }}<eos>{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 over bytes with its streaming.json."""
    folder = tmp_path_factory.mktemp("qwen2")
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=384, bos_token_id=None, eos_token_id=1, **SIZES)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    pieces = {"prompt": "<extra_id_0>", "header": "<extra_id_1>", "source_end": "</s>", "policy": "wait-k:2"}
    (folder / "streaming.json").write_text(json.dumps(pieces))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a byte-level BPE and a chat template."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<eos>", "<user>", "<bot>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([LINES] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", additional_special_tokens=special[1:])
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(fast), bos_token_id=None, eos_token_id=0, **SIZES)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(LINES)
    return str(file)


def traced(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    capsys.readouterr()  # what making the model said
    assert main(["demo", "--trace", "json", "--max-tokens", "24", *arguments]) == 0
    out, err = capsys.readouterr()
    assert not err
    return [json.loads(line) for line in out.splitlines()]


def test_columns(qwen: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["demo", "--model", str(qwen), "--text", text, "--max-tokens", "24"]) == 0
    out, err = capsys.readouterr()
    assert not err and "\033" not in out
    assert "READ" in out and "| WRITE" in out and "WaitK(2), holding on" in out
    for word in ("source tokens", "re-encoding", "AL ", "LAAL ", "merged", "extra", "one-shot"):
        assert word in out, word


@pytest.mark.parametrize("family", ["qwen", "llama"])
@pytest.mark.parametrize("policy", ["wait-k:1", "wait-k:5", "read-all", "threshold:0.05"])
def test_trace(
    family: str, policy: str, text: str, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    records = traced(capsys, "--model", str(folder), "--text", text, "--policy", policy)
    assert records[0]["event"] == "begin" and records[-1]["event"] == "total"
    begin, *middle, total = records
    assert begin["architecture"] == {"qwen": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[family]
    summaries = [r for r in middle if r["event"] == "summary"]
    assert [s["line"] for s in summaries] == [0, 1]
    for summary, spoken in zip(summaries, LINES.splitlines(), strict=True):
        events = [r for r in middle if r["line"] == summary["line"] and r["event"] != "summary"]
        assert {e["event"] for e in events} <= {"read", "write", "end"} and events[-1]["event"] == "end"
        words = [e["text"] for e in events if e["event"] == "read"]
        assert [w for w in words if w] == spoken.split()[: len([w for w in words if w])]
        assert all(e["time"] >= 0 for e in events)
        written = [e for e in events if e["event"] == "write"]
        assert sum((e["tokens"] for e in written), []) and summary["text"] == "".join(e["text"] for e in written)
        assert summary["source_words"] == len(spoken.split())
        assert summary["counts"]["source_tokens_projected"] == sum(summary["source_lengths"])
        assert 0 < summary["one_shot_difference"] < 1e-4
        if events[-1]["reason"] == "end":
            assert words == [*spoken.split(), ""]  # held on to the last word
    for name in ("source_tokens_projected", "extra_forwards", "re_encoded_source_tokens", "write_forwards"):
        assert total["counts"][name] == sum(s["counts"][name] for s in summaries)
    assert total["lines"] == 2 and total["one_shot_difference"] == max(s["one_shot_difference"] for s in summaries)
    if policy == "read-all":
        assert all(s["delays"] == [s["source_words"]] * len(s["delays"]) for s in summaries)


def test_the_difference_to_one_shot_would_show(
    qwen: Path, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With spans that hide one source token from every target row, the proof fails by far."""
    from streamkernels import demo_check

    honest = demo_check.from_limits
    fewer = lambda limits, *a, **options: honest([max(n - 1, 0) for n in limits], *a, **options)  # noqa: E731
    monkeypatch.setattr(demo_check, "from_limits", fewer)
    records = traced(capsys, "--model", str(qwen), "--text", text)
    assert records[-1]["one_shot_difference"] > 1e-3


def test_fp64_is_exact(qwen: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    records = traced(capsys, "--model", str(qwen), "--text", text, "--dtype", "float64")
    assert 0 < records[-1]["one_shot_difference"] < 1e-10


def test_the_checkpoint_says_how_it_streams(qwen: Path, llama: Path, text: str, capsys: Any) -> None:
    begin = traced(capsys, "--model", str(qwen), "--text", text)[0]
    assert (begin["prompt"], begin["header"], begin["source_end"]) == ("<extra_id_0>", "<extra_id_1>", "</s>")
    assert begin["policy"].startswith("WaitK(2)")
    begin = traced(capsys, "--model", str(llama), "--text", text)[0]
    assert (begin["prompt"], begin["header"], begin["source_end"]) == ("<user> ", "<bot>", "<eos>")
    assert begin["policy"].startswith("WaitK(5)")
    begin = traced(capsys, "--model", str(llama), "--text", text, "--header", "a b", "--prompt", "", "--early-end")[0]
    assert (begin["prompt"], begin["header"], begin["policy"]) == ("", "a b", "WaitK(5)")


def test_without_template_or_settings(qwen: Path, tmp_path: Path) -> None:
    for file in qwen.iterdir():
        if file.name != "streaming.json":
            (tmp_path / file.name).symlink_to(file)
    found = load_checkpoint(tmp_path)
    assert (found.prompt, found.header, found.source_end, found.policy) == ("", "\n", "", None)
    assert isinstance(found.tokenizer, ByT5Tokenizer) and not found.model.training
    assert next(found.model.parameters()).dtype == torch.float32
    (tmp_path / "streaming.json").write_text('{"header": 3}')
    with pytest.raises(ValueError, match="streaming.json: expected texts"):
        load_checkpoint(tmp_path)


def test_stdin_and_rate(qwen: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n  five thirty  pm\r\n\n"))
    records = traced(capsys, "--model", str(qwen), "--text", "-", "--rate", "40", "--policy", "read-all")
    reads = [r for r in records if r["event"] == "read"]
    assert [r["text"] for r in reads] == ["five", "thirty", "pm", ""]
    assert reads[2]["time"] - reads[0]["time"] >= 0.045


def test_words_come_as_they_arrive() -> None:
    class Pipe(io.StringIO):
        taken = 0

        def read(self, size: int | None = -1, /) -> str:
            self.taken += 1
            return super().read(size)

    pipe = Pipe("one two\n\nthree four five")
    found = []
    for words in Utterances(pipe):
        first = next(words)
        found.append((first, pipe.taken))
        if first == "three":
            assert list(words) == ["four", "five"]
    # the first line's second word was not asked for, and is skipped
    assert found == [("one", 4), ("three", 15)]


def test_policies() -> None:
    assert repr(policy_of("wait-k:3")) == "WaitK(3)" and isinstance(policy_of("read-all"), ReadAll)
    assert repr(policy_of("threshold:0.7")) == "Threshold(0.7)"
    assert HoldOn(WaitK(3)).visible(0, 9) == 3 and not hasattr(HoldOn(policy_of("threshold:1")), "visible")


def test_holding_on_reads_what_an_early_end_leaves(qwen: Path, tmp_path: Path, text: str, capsys: Any) -> None:
    """A model that always ends at once: with --early-end nothing more is read, without it the source is read out."""
    from safetensors.torch import load_file, save_file

    for file in qwen.iterdir():
        (tmp_path / file.name).symlink_to(file)
    weights = load_file(qwen / "model.safetensors")
    weights["lm_head.weight"] = torch.zeros_like(weights["model.embed_tokens.weight"])
    (tmp_path / "model.safetensors").unlink()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0}')  # the first of equal logits
    early = traced(capsys, "--model", str(tmp_path), "--text", text, "--early-end")
    held = traced(capsys, "--model", str(tmp_path), "--text", text)
    reads = [[r["text"] for r in records if r["event"] == "read" and r["line"] == 0] for records in (early, held)]
    assert reads == [["the", "meeting"], [*LINES.split("\n")[0].split(), ""]]
    assert early[-1]["latency"]["AL"] is None and early[-1]["counts"]["extra_forwards"] == 0
    assert held[-1]["counts"]["extra_forwards"] == (7 - 2 + 1) + (5 - 2 + 1)


MISTAKES = [
    (["--policy", "wait-k:0"], "--policy: expected wait-k:K"),
    (["--policy", "wait-k"], "--policy: expected wait-k:K"),
    (["--policy", "threshold:1.5"], "--policy: expected wait-k:K"),
    (["--policy", "sometimes"], "got 'sometimes'"),
    (["--rate", "0"], "--rate: expected words per second > 0"),
    (["--max-tokens", "0"], "--max-tokens: expected at least 1"),
    (["--text", "missing.txt"], "--text missing.txt: No such file"),
    (["--model", "missing"], "--model missing: no such folder"),
    (["--model", "."], "config.json"),
    (["--model", "gpt2"], "expected a Llama or Qwen2 checkpoint, got model_type 'gpt2'"),
    (["--model", "broken"], "--model broken: "),
    (["--text", "empty.txt"], "got an empty text"),
    (["--header", ""], "header: expected at least one token"),
]


@pytest.mark.parametrize("dtype, most", [("float32", 1e-4), ("bfloat16", 0.5)])
@pytest.mark.parametrize("chosen", [False, True])
def test_the_fused_path_where_it_is_fastest(
    chosen: bool, dtype: str, most: float, llama: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every step is fused, on the GPU if there is one, or where --device says; it agrees with one forward."""
    from streamkernels.integrations.transformers import fused

    calls: list[str] = []
    honest = fused.incremental_prefill

    def counted(q: torch.Tensor, *given: Any, **options: Any) -> Any:
        calls.append(q.device.type)
        return honest(q, *given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "incremental_prefill", counted)
        where = ("--device", "cpu") if chosen else ()
        records = traced(capsys, "--model", str(llama), "--text", text, "--dtype", dtype, *where)
    device = "cpu" if chosen or not torch.cuda.is_available() else "cuda"
    assert records[0]["device"] == device and records[0]["fused"] is True
    counts = records[-1]["counts"]
    forwards = sum(counts[f"{kind}_forwards"] for kind in ("read", "write", "merged"))
    assert calls == [device] * (SIZES["num_hidden_layers"] * forwards) and forwards
    assert 0 < records[-1]["one_shot_difference"] < most


@pytest.mark.parametrize("arguments, message", MISTAKES)
def test_mistakes(
    arguments: list[str],
    message: str,
    qwen: Path,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "broken").mkdir()
    for file in qwen.iterdir():
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes()[:600])
    given = arguments if "--model" in arguments else ["--model", str(qwen), *arguments]
    given = given if "--text" in given else [*given, "--text", text]
    assert main(["demo", *given]) == 2
    out, err = capsys.readouterr()
    assert not out
    line = err.splitlines()[-1]
    assert message in line and line.startswith("streamkernels demo: ") and "Traceback" not in err


def test_no_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from streamkernels import demo

    monkeypatch.setattr(demo, "example_file", lambda name: None)
    assert main(["demo", "--text", os.devnull]) == 2
    assert "or give --model PATH" in capsys.readouterr().err
    assert main(["demo"]) == 2
    assert "no text" in capsys.readouterr().err


def test_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["demo", "--rate", "fast"], ["dance"]):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 2
    capsys.readouterr()


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for name in ("streamkernels", "torch", "triton", "transformers", "GPU", "reference", "CUDA kernels"):
        assert name in out


def test_as_a_process(qwen: Path, tmp_path: Path) -> None:
    """From elsewhere, with words on stdin, and in a locale that cannot print them all."""
    command = [sys.executable, "-m", "streamkernels", "demo", "--model", str(qwen), "--text", "-", "--max-tokens", "9"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    run = subprocess.run(command, input="five €20\n".encode(), capture_output=True, cwd=tmp_path, env=env, timeout=240)
    assert run.returncode == 0 and b"| WRITE" in run.stdout and b"one-shot" in run.stdout
    assert not run.stderr


def test_bench_names_what_there_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], cwd: Path) -> Any:
        ran.append([str(Path(c).name) for c in command[1:]])
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr("streamkernels.cli.subprocess.run", run)
    assert main(["bench", "span_attention"]) == 3
    assert main(["bench", "span_attention", "--compile-only"]) == 3
    first = ["-m", "pytest", "-s", "bench_span_attention.py"]
    assert ran[0] == first and ran[1][:3] == ["-m", "pytest", "--compile-only"] and ran[1][-1] == first[-1]
    assert main(["bench"]) == 3 and len(ran[2]) >= 3 + len(list((ROOT / "bench").glob("bench_*.py")))
    assert main(["bench", "typo"]) == 2 and "no benchmark of 'typo'; there are" in capsys.readouterr().err
    assert len(ran) == 3


def test_bench_outside_of_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr("streamkernels.cli.__file__", str(tmp_path / "streamkernels" / "cli.py"))
    assert main(["bench"]) == 2
    assert "run this from a checkout" in capsys.readouterr().err
