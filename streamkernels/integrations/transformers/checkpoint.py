"""A model folder as a streaming session needs it: weights, tokenizer, and the texts around source and target."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaForCausalLM, Qwen2ForCausalLM
from transformers.utils import logging

from ...core.shapes import refuse

SETTINGS = "streaming.json"
_OP = "load_checkpoint"
_CLASSES: dict[str, Any] = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}
_NAMES = ("prompt", "header", "source_end", "policy")
_MARK = "streamkernels-source"


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` found. prompt, header, source_end: texts for `StreamSession`; policy: the one to use where
    none is asked for, as the command line writes it, or None."""

    model: Any
    tokenizer: Any
    prompt: str
    header: str
    source_end: str
    policy: str | None


def load_checkpoint(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Checkpoint:
    """Load a local Llama or Qwen2 checkpoint for streaming, in eval mode; nothing is ever downloaded.

    path: a folder as `save_pretrained` writes it. A file `streaming.json` in it says what a streaming model was trained
    with: a JSON object of texts, any of prompt, header, source_end, policy ('wait-k:5'). What it leaves out comes from
    the tokenizer's chat template (what stands before and after a user's message, and before the answer); without one
    the source begins with the BOS token, if there is one, and the target after a new line.

    Raises ValueError for a folder without a checkpoint or with broken settings, NotImplementedError for a model of
    another family, and what transformers raises for broken weights.
    """
    folder = Path(path)
    config = _json(folder / "config.json", "a folder with config.json, as save_pretrained writes it")
    family = config.get("model_type")
    if family not in _CLASSES:
        refuse(_OP, "path", "a Llama or Qwen2 checkpoint", f"model_type {family!r} in {folder}", NotImplementedError)
    settings = {}
    if (folder / SETTINGS).exists():
        settings = _json(folder / SETTINGS, "a JSON object in it")
        wrong = [name for name, text in settings.items() if name not in _NAMES or not isinstance(text, str)]
        if wrong:
            refuse(_OP, SETTINGS, f"texts for any of {', '.join(_NAMES)}", f"{wrong[0]!r}: {settings[wrong[0]]!r}")
    tokenizer = _tokenizer(folder)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = _CLASSES[family].from_pretrained(folder, dtype=dtype, local_files_only=True)
    finally:
        if bars:
            logging.enable_progress_bar()
    texts = {**_pieces(tokenizer), "policy": None, **settings}
    return Checkpoint(model.to(device).eval(), tokenizer, **texts)


def _json(file: Path, expected: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        refuse(_OP, "path", expected, f"no readable {file}")
    except ValueError as error:
        refuse(_OP, file.name, "valid JSON", f"{error} in {file}")
    if not isinstance(found, dict):
        refuse(_OP, file.name, "a JSON object", f"{type(found).__name__} in {file}")
    return found


def _tokenizer(folder: Path) -> Any:
    file = folder / "tokenizer_config.json"
    named = _json(file, "a tokenizer in the folder").get("tokenizer_class") if file.exists() else None
    # AutoTokenizer goes by the model's type for qwen2, whatever class was saved
    kind = ByT5Tokenizer if named == "ByT5Tokenizer" else AutoTokenizer
    return kind.from_pretrained(folder, local_files_only=True)


def _pieces(tokenizer: Any) -> dict[str, str]:
    """prompt, header and source_end of a checkpoint that does not say what they are."""
    plain = {"prompt": tokenizer.bos_token or "", "header": "\n", "source_end": ""}
    if not getattr(tokenizer, "chat_template", None):
        return plain
    messages = [{"role": "user", "content": _MARK}]
    asked = tokenizer.apply_chat_template(messages, tokenize=False)
    answering = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt, mark, source_end = asked.partition(_MARK)
    if not mark:
        return plain
    header = answering.removeprefix(asked) if answering.startswith(asked) else ""
    if not header:
        # a template in which the end of the message is what begins the answer
        header, source_end = answering.partition(_MARK)[2], ""
    return {"prompt": prompt, "header": header or plain["header"], "source_end": source_end}
