"""A small trained checkpoint with its tokenizer, and scores of tasks by an independent computation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from open_lm.model.losses import token_loss
from open_lm.model.transformer import Transformer, create_model

EXAMPLES = 23  # odd, so that two processes get different numbers of examples
CONFIG = {"hidden_dim": 64, "n_layers": 2, "n_heads": 4, "seq_len": 160, "vocab_size": 640}
CONFIG |= {"post_embed_norm": False, "weight_tying": False}


@dataclass
class Trained:
    """A checkpoint of a small model with its tokenizer."""

    folder: Path
    model: Transformer
    tokenizer: Any

    def arguments(self, *extra: str) -> list[str]:
        return [
            *("--model-config", str(self.folder / "small.json"), "--checkpoint", str(self.folder / "epoch_2.pt")),
            *("--tokenizer", str(self.folder / "tokenizer.json"), "--device", "cpu", *extra),
        ]


@dataclass
class Shape:
    model: str


def rows(data: Path, name: str) -> list[dict[str, Any]]:
    with open(data / f"{name}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for _, line in zip(range(EXAMPLES), file, strict=False)]


def train_small_model(folder: Path, data: Path) -> Trained:
    """Train a model that memorizes its lambada passages, so that its scores differ from random guessing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = [f"{row['context']} {row['continuation']}" for row in rows(data, "lambada_openai")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "small.json").write_text(json.dumps(CONFIG))

    model = create_model(Shape(str(folder / "small.json")))
    model.reset_parameters(seed=0)
    length = 129
    batch = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids = tokenizer.encode(text).ids[-length:]
        batch[row, : len(ids)] = torch.tensor(ids)
    targets = batch[:, 1:].masked_fill(batch[:, 1:] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.0)
    for _ in range(22):
        loss, tokens = token_loss(model(batch[:, :-1])[0], targets)
        (loss / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 2, "name": "small", "state_dict": state}, folder / "epoch_2.pt")
    return Trained(folder, model.eval(), tokenizer)


def log_probabilities(trained: Trained, context: str, answer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the answer's token ids (T,) and the model's log-probabilities (T,V) there, without padding."""
    ids = trained.tokenizer.encode(answer).ids
    prompt = trained.tokenizer.encode(context).ids[-(trained.model.seq_len - len(ids)) :]
    with torch.no_grad():
        logits = trained.model(torch.tensor([prompt + ids]))[0][0]
    return torch.tensor(ids), F.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)


def choice_accuracy(trained: Trained, questions: list[tuple[list[tuple[str, str]], int]]) -> float:
    """Return the share of questions whose correct (context, answer) has the highest mean log-probability per token."""
    correct = 0
    for pairs, gold in questions:
        means = []
        for context, answer in pairs:
            ids, log_probs = log_probabilities(trained, context, answer)
            means.append(log_probs.gather(1, ids[:, None]).mean())
        correct += int(torch.stack(means).argmax()) == gold
    return correct / len(questions)
