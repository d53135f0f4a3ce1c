"""Asks a model, or an adapter on its base: python -m finetune.ask FOLDER "Who are you?" "你是谁？"

Without questions it is a conversation in the terminal: answers appear as they are written, an empty line ends it.
"""

import argparse
import json
from pathlib import Path

from .errors import UserError, run
from .quiet import quiet


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m finetune.ask", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", metavar="FOLDER", help="a model, or the output folder of a LoRA run")
    parser.add_argument("questions", nargs="*", metavar="QUESTION")
    parser.add_argument("--questions_file", type=Path, help="a JSON list of questions")
    parser.add_argument("--base", help="the adapter's base, if it has moved")
    parser.add_argument("--system", default="You are a helpful assistant.", help="the system message")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument(
        "--sample", action="store_true", help="draw answers as generation_config.json says, instead of the likeliest"
    )
    options = parser.parse_intermixed_args(argv)
    quiet()
    run(lambda: ask(options))


def ask(options) -> None:
    """Answers the questions given, or holds a conversation."""
    questions = options.questions
    if options.questions_file:
        questions = questions + read_questions(options.questions_file)
    answerer = Answerer(options)
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


class Answerer:
    """A loaded model with its settings; remembers nothing between questions unless given a history."""

    def __init__(self, options):
        self.tokenizer, self.model = load(options.folder, options.base)
        self.settings = {"system": options.system, "max_new_tokens": options.max_new_tokens}
        if not options.sample:
            self.settings |= {
                "do_sample": False,
                "top_p": 1.0,
                "top_k": 50,
            }  # at their defaults: not used, and no warning

    def answer(self, question: str) -> str:
        """One answer, without a history."""
        return self.model.chat(self.tokenizer, question, **self.settings)[0]

    def stream(self, question: str, history):
        """The growing answer."""
        return self.model.chat_stream(self.tokenizer, question, history, **self.settings)


def load(name: str, base: str | None):
    """(tokenizer, model on the GPU if there is one) of a model folder, a hub id, or an adapter folder."""
    import torch

    from . import checkpoint, model, model_folder

    folder = Path(name)
    if (folder / "adapter_config.json").is_file():
        base_folder = model.find_base(folder, base)
        tokenizer = model.load_tokenizer(base_folder)
        loaded = model.load_tuned(base_folder, folder, checkpoint.stored_dtype(base_folder))
    else:
        folder = model.find_folder(name)
        tokenizer = model.load_tokenizer(folder)
        if problems := list(model_folder.problems(folder, may_be_quantized=True)):
            raise UserError(*problems)
        loaded = model.load_weights(folder, "auto", half_on_cuda=False)
        model.set_chat_settings(loaded, tokenizer)  # a base model answers too, as well as it can
    return tokenizer, loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def converse(answerer: Answerer) -> None:
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
