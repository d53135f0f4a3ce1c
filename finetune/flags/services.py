"""Services that a run speaks to: where it is logged (--report_to), and the hub that it is pushed to (--push_to_hub)."""

import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import on_first_rank, shortened

# --report_to: the package to install
REPORTERS = {
    "azure_ml": "azureml-mlflow", "clearml": "clearml", "codecarbon": "codecarbon", "comet_ml": "comet-ml", "dagshub": "dagshub",
    "dvclive": "dvclive", "flyte": "flytekit", "kubeflow": "kubeflow", "mlflow": "mlflow", "neptune": "neptune",
    "swanlab": "swanlab", "tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb",
}  # fmt: skip
ALONE = ("none", "all")


def reporting(args) -> Iterator[str]:
    """The services of --report_to are known, installed, and can be logged in to."""
    asked = args.training.report_to or []
    asked = [asked] if isinstance(asked, str) else asked
    if len(asked) > 1 and (alone := [name for name in ALONE if name in asked]):
        yield f"--report_to {' '.join(asked)}: {alone[0]} stands alone - leave out the others, or {alone[0]}"
        return
    if set(asked) <= {*ALONE}:
        return
    from transformers.integrations import get_available_reporting_integrations

    there = get_available_reporting_integrations()
    for name in asked:
        if name not in there:
            package = REPORTERS.get(name)
            remedy = f"pip install {package}" if package else f"known are {', '.join(REPORTERS)}"
            yield f"--report_to {shortened(name)}: unknown or not installed - {remedy}; here are {', '.join([*there, *ALONE])}"
    if "wandb" in asked and "wandb" in there and not knows_wandb():
        yield "--report_to wandb: no key to log in with - wandb login, or WANDB_API_KEY; WANDB_MODE=offline logs without a connection"


def knows_wandb() -> bool:
    """Whether wandb can begin without asking for a key."""
    offline = os.environ.get("WANDB_MODE", "").lower() in ("offline", "dryrun", "disabled", "shared")
    return offline or bool(os.environ.get("WANDB_API_KEY")) or any((Path.home() / name).is_file() for name in (".netrc", "_netrc"))


def pushing(args) -> Iterator[str]:
    """--push_to_hub has a connection, and a token that the hub knows. Asks the hub, and writes nothing there."""
    training = args.training
    if not training.push_to_hub or not on_first_rank():
        return
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        yield "--push_to_hub: HF_HUB_OFFLINE is set, so there is no connection to the hub - unset it, or leave this flag out"
        return
    token = training.hub_token or huggingface_hub.get_token()
    if not token:
        yield "--push_to_hub: no token - hf auth login, HF_TOKEN in the environment, or leave this flag out"
        return
    try:
        huggingface_hub.whoami(token=token)
    except Exception as error:
        why = shortened(f"{type(error).__name__}: {error}", 200).replace(token, "...")
        yield f"--push_to_hub: the hub cannot be reached, or does not know the token ({why}) - mend that, or leave this flag out"
