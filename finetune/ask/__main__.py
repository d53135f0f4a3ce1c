"""Asks a model, or an adapter on its base: python -m finetune.ask FOLDER "Who are you?" "你是谁？"

Without questions it is a conversation in the terminal: answers appear as they are written, an empty line ends it. With
--tools the model may call some: its calls are shown, and in a conversation their results are asked for.
"""

import json
from pathlib import Path

from ..errors import Options, UserError, run
from ..model import packages
from ..quiet import quiet
from .answerers import open_answerer
from .tools import asked, converse_with_tools, read_tools, told


def main(argv: list[str] | None = None) -> None:
    parser = Options(prog="python -m finetune.ask", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", metavar="FOLDER", help="a model, or the output folder of a LoRA run")
    parser.add_argument("questions", nargs="*", metavar="QUESTION", default=[])
    parser.add_argument("--questions_file", type=Path, help="a JSON list of questions")
    parser.add_argument("--tools", type=Path, help="a JSON list of tools: name, description, parameters (JSON schema)")
    parser.add_argument("--base", help="the adapter's base, if it has moved")
    parser.add_argument(
        "--system",
        help="the system message; default: the one that all conversations of the training data had, else the model's own, or "
        '"You are a helpful assistant."',
    )
    parser.add_argument(
        "--thinking",
        choices=("auto", "on", "off"),
        default="auto",
        help="whether a later Qwen that can think is asked to; auto: not if FOLDER's training.json says that it learned only "
        "answers without thoughts, else as its chat template does",
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
    tools = read_tools(options.tools) if options.tools else []
    answerer = open_answerer(options)
    for question in questions:
        if tools:
            answer = told(answerer.reply([{"role": "user", "content": question}], tools))
        else:
            answer = answerer.answer(question)
        print(f"Q: {question}\nA: {answer}\n", flush=True)
    if not questions:
        converse_with_tools(answerer, tools) if tools else converse(answerer)


def read_questions(path: Path) -> list[str]:
    """A JSON list of strings."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"--questions_file {path}: {error} - give a JSON list of questions") from error
    if not isinstance(found, list) or not all(isinstance(question, str) for question in found):
        raise UserError(f"--questions_file {path}: not a list of strings - give a JSON list of questions")
    return found


def converse(answerer) -> None:
    """Reads questions from the terminal until an empty line or the end."""
    history = []
    while question := asked("you: "):
        shown = ""
        print("model: ", end="", flush=True)
        for text in answerer.stream(question, history):
            print(text[len(shown) :], end="", flush=True)
            shown = text
        print(flush=True)
        history.append((question, shown))


if __name__ == "__main__":
    main()
