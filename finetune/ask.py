"""Asks a model, or an adapter on its base: python -m finetune.ask FOLDER "Who are you?" "你是谁？"

Without questions it is a conversation in the terminal: answers appear as they are written, an empty line ends it.
"""

import argparse
import json
from pathlib import Path
from threading import Thread

from .compare.opened import GREEDY, open_named
from .errors import UserError, run
from .folders.model_folder import LATER_TYPES
from .model import packages
from .quiet import quiet


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m finetune.ask", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", metavar="FOLDER", help="a model, or the output folder of a LoRA run")
    parser.add_argument("questions", nargs="*", metavar="QUESTION")
    parser.add_argument("--questions_file", type=Path, help="a JSON list of questions")
    parser.add_argument("--base", help="the adapter's base, if it has moved")
    parser.add_argument(
        "--system", help='the system message; default: the model\'s own, or "You are a helpful assistant."'
    )
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument(
        "--sample", action="store_true", help="draw answers as generation_config.json says, instead of the likeliest"
    )
    options = parser.parse_intermixed_args(argv)
    quiet()

    def job():
        if argv is None:  # a process of its own
            packages.leave_out_with([options.folder], options.base)
        ask(options)

    run(job)


def ask(options) -> None:
    """Answers the questions given, or holds a conversation."""
    questions = options.questions
    if options.questions_file:
        questions = questions + read_questions(options.questions_file)
    answerer = open_answerer(options)
    if questions:
        for question in questions:
            print(f"Q: {question}\nA: {answerer.answer(question)}\n", flush=True)
    else:
        converse(answerer)


def read_questions(path: Path) -> list[str]:
    """A JSON list of strings."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--questions_file {path}: {error} - give a JSON list of questions") from error
    if not isinstance(found, list) or not all(isinstance(question, str) for question in found):
        raise UserError(f"--questions_file {path}: not a list of strings - give a JSON list of questions")
    return found


def open_answerer(options):
    """The Answerer of the model that options.folder holds."""
    opened = open_named(options.folder, options.base)
    model = opened.load()
    kind = LaterAnswerer if model.config.model_type in LATER_TYPES else Answerer
    return kind(opened.tokenizer, model, options)


class Answerer:
    """First-generation Qwen with its settings; remembers nothing between questions unless given a history."""

    def __init__(self, tokenizer, model, options):
        self.tokenizer, self.model = tokenizer, model
        self.settings = {"max_new_tokens": options.max_new_tokens} | ({} if options.sample else GREEDY)
        if options.system is not None:
            self.settings["system"] = options.system

    def answer(self, question: str) -> str:
        """One answer, without a history."""
        return self.model.chat(self.tokenizer, question, **self.settings)[0]

    def stream(self, question: str, history):
        """The growing answer."""
        return self.model.chat_stream(self.tokenizer, question, history, **self.settings)


class LaterAnswerer:
    """The same for later Qwens: their own chat template makes the prompt, transformers' generate the answer."""

    def __init__(self, tokenizer, model, options):
        self.tokenizer, self.model, self.system = tokenizer, model, options.system
        self.settings = {"max_new_tokens": options.max_new_tokens} | ({} if options.sample else GREEDY)

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
        turns = [("system", self.system)] if self.system is not None else []
        for asked, answered in history:
            turns += [("user", asked), ("assistant", answered)]
        messages = [{"role": role, "content": text} for role, text in [*turns, ("user", question)]]
        prompt = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        return {name: prompt[name].to(self.model.device) for name in ("input_ids", "attention_mask")}


def converse(answerer) -> None:
    """Reads questions from the terminal until an empty line or the end."""
    history = []
    while True:
        try:
            question = input("you: ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not question:
            return
        shown = ""
        print("model: ", end="", flush=True)
        for text in answerer.stream(question, history):
            print(text[len(shown) :], end="", flush=True)
            shown = text
        print(flush=True)
        history.append((question, shown))


if __name__ == "__main__":
    main()
