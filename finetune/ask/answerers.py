"""A model that can be asked, of the first generation or a later one: the same methods for both.

Messages and tools have the form of data/messages.py.
"""

from pathlib import Path
from threading import Thread

from ..compare.opened import GREEDY, open_named
from ..conversations.tool_text import split_calls
from ..errors import UserError, note
from ..folders import output_folder
from ..folders.model_folder import LATER_TYPES


def open_answerer(options):
    """The Answerer of the model that options.folder holds."""
    opened = open_named(options.folder, options.base)
    model = opened.load()
    kind = LaterAnswerer if model.config.model_type in LATER_TYPES else Answerer
    if options.system is None and (learned := system_of(options.folder)):
        options.system = learned
        note(f"asking with the system message of the training data: {learned[:60]!r}{'...' * (len(learned) > 60)} (--system for another)")
    return kind(opened.tokenizer, model, options)


def system_of(folder: str) -> str | None:
    """The system text that all conversations had which a folder's model learned from; None where they had none, or several."""
    return output_folder.read_record(Path(folder)).get("data", {}).get("system")


class Answerer:
    """First-generation Qwen with its settings; remembers nothing between questions unless given a history."""

    def __init__(self, tokenizer, model, options):
        self.tokenizer, self.model, self.system = tokenizer, model, options.system
        self.settings = {"max_new_tokens": options.max_new_tokens} | ({} if options.sample else GREEDY)
        self.chat_settings = self.settings | ({} if self.system is None else {"system": self.system})

    def answer(self, question: str) -> str:
        """One answer, without a history."""
        return self.model.chat(self.tokenizer, question, **self.chat_settings)[0]

    def stream(self, question: str, history):
        """The growing answer."""
        return self.model.chat_stream(self.tokenizer, question, history, **self.chat_settings)

    def reply(self, messages: list[dict], tools: list[dict]) -> dict:
        """The next message of a conversation with tools."""
        from qwen_model.react import render_asked

        messages = [*opening(self.system), *messages]
        try:
            render_asked(messages, tools)
        except ValueError as error:  # what the user gave cannot be told in this form
            raise UserError(f"{error} - change the tools, or what is said") from error
        return self.model.answer(self.tokenizer, messages, tools, **self.settings)


class LaterAnswerer:
    """The same for later Qwens: their own chat template makes the prompt, transformers' generate the answer."""

    def __init__(self, tokenizer, model, options):
        self.tokenizer, self.model, self.system = tokenizer, model, options.system
        self.settings = {"max_new_tokens": options.max_new_tokens} | ({} if options.sample else GREEDY)
        from ..samples.rendering import Rendering  # not above: without numpy the program still says what is missing

        record = output_folder.read_record(Path(options.folder))
        self.thinking, self.rendering = thinking_of(options, record), Rendering.of_record(record)

    def answer(self, question: str) -> str:
        """One answer, without a history."""
        prompt = self.prompt(question, [])
        ids = self.model.generate(**prompt, **self.settings)[0, prompt["input_ids"].shape[1] :]
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def stream(self, question: str, history):
        """The growing answer. It is written in a thread, whose error, if there is one, is raised here."""
        from transformers import TextIteratorStreamer

        streamer, errors = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True), []

        def write():
            try:
                self.model.generate(**self.prompt(question, history), streamer=streamer, **self.settings)
            except Exception as error:
                errors.append(error)
                streamer.end()

        Thread(target=write, daemon=True).start()
        text = ""
        for piece in streamer:
            text += piece
            yield text
        if errors:
            raise errors[0]

    def prompt(self, question: str, history) -> dict:
        """{input_ids, attention_mask} of the conversation so far, (1, T) each. history: (question, answer) pairs."""
        turns = []
        for asked, answered in history:
            turns += [("user", asked), ("assistant", answered)]
        return self.tokenized([{"role": role, "content": text} for role, text in [*turns, ("user", question)]])

    def tokenized(self, messages: list[dict], tools: list[dict] = ()) -> dict:
        """{input_ids, attention_mask} of a conversation up to the next answer, (1, T) each."""
        import torch

        from ..samples.chat_template import prompt_ids

        messages = [*opening(self.system), *messages]
        ids = prompt_ids(self.tokenizer, messages, list(tools), self.rendering, **self.thinking)
        input_ids = torch.tensor([ids], device=self.model.device)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def reply(self, messages: list[dict], tools: list[dict]) -> dict:
        """The next message of a conversation with tools."""
        prompt = self.tokenized(messages, tools)
        if prompt["input_ids"].tolist() == self.tokenized(messages)["input_ids"].tolist():
            raise UserError("--tools: the model's chat template does not show them to it - leave them out")
        before = prompt["input_ids"].shape[1]
        ids = self.model.generate(**prompt, **self.settings)[0, before:]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        if self.tokenizer.decode(prompt["input_ids"][0]).rstrip().endswith("<think>"):
            text = f"<think>{text}"  # some templates begin the thoughts
        return message_of(text, tools)


def thinking_of(options, record: dict) -> dict[str, bool]:
    """The template's enable_thinking, so that the model is asked as it was trained; {} leaves it to the template.

    record: the folder's training.json.
    """
    if options.thinking == "auto":
        return {"enable_thinking": False} if record.get("data", {}).get("without_thoughts") else {}
    return {"enable_thinking": options.thinking == "on"}


def opening(system: str | None) -> list[dict]:
    """The system message, if there is one."""
    return [] if system is None else [{"role": "system", "content": system}]


def message_of(text: str, tools: list[dict]) -> dict:
    """What a later Qwen has written, as a message: thoughts that it did not end are thoughts."""
    thoughts = ""
    if text.lstrip().startswith("<think>") or "</think>" in text:
        thoughts, _, text = text.partition("</think>")
        thoughts = thoughts.lstrip().removeprefix("<think>").strip()
    content, calls = split_calls(text.strip(), tools)
    message = {"role": "assistant", "content": content}
    message |= {"reasoning_content": thoughts} if thoughts else {}
    return message | ({"tool_calls": calls} if calls else {})
