"""Small files of conversations, what reading them finds wrong, and what they look like as bytes."""

import json
from pathlib import Path

import pytest

from finetune.conversations.reading import read
from finetune.errors import UserError


def turns(*pairs) -> dict:
    """A sample in the documented form."""
    return {"conversations": [{"from": role, "value": value} for role, value in pairs]}


GOOD = turns(("user", "hi"), ("assistant", "yo"))
TALK = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "line\u2028separator\u0085 \x1c here"},
    {"role": "assistant", "content": "ok\n"},
]


def write(folder: Path, data: object, name: str = "talk.json") -> Path:
    """Writes bytes, text, or anything else as JSON."""
    path = folder / name
    text = data if isinstance(data, str | bytes) else json.dumps(data, ensure_ascii=False)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def findings(path: Path) -> list[str]:
    """What read() finds wrong, without the path at the start of each line."""
    with pytest.raises(UserError) as caught:
        read(path)
    assert all(line.startswith(f"{path}: ") for line in caught.value.findings), caught.value.findings
    return [line.removeprefix(f"{path}: ") for line in caught.value.findings]


START, END = 256, 257
SYSTEM = "You are a helpful assistant."


class ByteTokenizer:
    """One token per byte of UTF-8."""

    im_start_id, im_end_id = START, END

    def __init__(self, vocabulary: dict | None = None):
        self.vocabulary = vocabulary or {"any": 0}

    def encode_ordinary(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_ordinary_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode_ordinary(text) for text in texts]

    def decode(self, ids: list[int], **settings) -> str:
        return bytes(ids).decode()

    def get_vocab(self) -> dict:
        return self.vocabulary


def laid_out(messages: list[dict], max_length: int = 10**9) -> tuple[list[int], list[int]]:
    """(ids, labels) of a conversation in bytes, supervised on its answers."""
    ids, labels = [], []
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": SYSTEM}, *messages]
    for message in messages:
        head = [START, *f"{message['role']}\n".encode()]
        body = [*message["content"].encode(), END]
        learned = message["role"] == "assistant" and message.get("weight", 1)
        ids += head + body + [10]
        labels += [-100] * len(head) + (body if learned else [-100] * len(body)) + [-100]
    return ids[:max_length], labels[:max_length]


def talk(*contents: str, **more) -> dict:
    roles = ["user", "assistant"] * len(contents)
    return {"messages": [{"role": role, "content": content} for role, content in zip(roles, contents)]} | more


SAMPLES = [talk("你好", "I am <|im_end|> Qwen"), talk("a", "b", "c", "d", system="Be brief."), talk("q" * 70, "r" * 90)]
SAMPLES[1]["messages"][1]["train"] = False


def messages_of(sample: dict) -> list[dict]:
    """The inner form of one of SAMPLES."""
    system = [{"role": "system", "content": sample["system"]}] if "system" in sample else []
    said = [{key: value for key, value in message.items() if key != "train"} for message in sample["messages"]]
    return system + [m | {"weight": 0.0} if "train" in given else m for m, given in zip(said, sample["messages"])]
