"""Upload an adapter or a merged model to Hugging Face's hub, with a model card filled from the run that made it.

    python publishing/push_to_hub.py --model_dir out/RUN/final --repo_id me/my-adapter
    python publishing/push_to_hub.py --model_dir out/RUN/final --repo_id me/my-adapter --out_dir upload   # only look

Only the files of the model are uploaded, not what else is in its folder; they name the base by its name on the hub, and
no path of this machine. A token that may write is in the environment variable HF_TOKEN, or was stored by
`hf auth login`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shell import cli
from shell.cli import UserError


@dataclass
class Settings:
    """The command line.

    Args:
        model_dir: The adapter (final/ or a step of a run), or the merged model, to upload.
        repo_id: Where to, such as me/my-adapter.
        base_model: The base's name on the hub, if its folder is not checkpoints/ORG/NAME.
        license: The base's licence as the hub calls it, such as apache-2.0, if its folder has no model card that says.
        run_dir: Folder of the run that made the model; by default the folder that model_dir is in, if it is a run's.
        private: Whether a new repository can be seen by its owner alone.
        revision: Branch to upload to, if not main; it is made if it is not there.
        message: Of the commit.
        out_dir: Write the folder that would be uploaded, to look at, and upload nothing.
    """

    model_dir: Path
    repo_id: str
    base_model: str | None = None
    license: str | None = None
    run_dir: Path | None = None
    private: bool = False
    revision: str | None = None
    message: str = "Upload from onetune"
    out_dir: Path | None = None

    def __post_init__(self):
        for name in ("model_dir", "run_dir"):
            path = getattr(self, name)
            if path is not None and not path.is_dir():
                raise UserError(f"--{name} {path}: no such folder")
        if self.out_dir is not None and self.out_dir.exists():
            raise UserError(f"--out_dir {self.out_dir} exists already: choose another")


if __name__ == "__main__":
    settings = cli.parse(Settings)

import re
import tempfile

from publishing.model_card import Card, base_name, licence_of, write_card
from publishing.model_files import ADAPTER, BASE, copy_model, is_adapter, left_out
from shell.files import MANIFEST, check_manifest, new_folder, read_json
from tracking.run_files import is_run, read_settings
from weights.checkpoint import copy_legal_files, find_base, read_notes


def main(s: Settings) -> None:
    """Make the folder, and upload it."""
    check_repo_id(s)
    card = describe(s)
    if s.out_dir is not None:
        make_folder(s, card, s.out_dir)
        print(f"written to {s.out_dir}: nothing was uploaded")
        return
    with tempfile.TemporaryDirectory() as folder:
        make_folder(s, card, Path(folder, "upload"))
        print(f"uploaded to {upload(s, Path(folder, 'upload'))}")


def check_repo_id(s: Settings) -> None:
    """Raise UserError if --repo_id is no name of a repository, or --model_dir no adapter and no model."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(s.repo_id)
        whole = "/" in s.repo_id  # the hub would put the user's name before it, which the card does not know
    except HFValidationError:
        whole = False
    if not whole:
        raise UserError(f"--repo_id {s.repo_id}: expected a name such as me/my-adapter")
    if not is_adapter(s.model_dir) and not (s.model_dir / "config.json").is_file():
        raise UserError(f"--model_dir {s.model_dir}: neither an adapter ({ADAPTER}) nor a model (config.json)")
    if (s.model_dir / MANIFEST).is_file():
        check_manifest(s.model_dir)


def describe(s: Settings) -> Card:
    """What the model card says. Raises UserError if the base's name or licence cannot be found."""
    run_dir = s.run_dir or s.model_dir.resolve().parent
    if s.run_dir is not None and not is_run(s.run_dir):
        raise UserError(f"--run_dir {s.run_dir}: no run of finetune.py")
    run_dir = run_dir if is_run(run_dir) else None
    notes = read_notes(s.model_dir)
    noted = notes.get("checkpoint_dir") or (read_settings(run_dir)["checkpoint_dir"] if run_dir else None)
    base = s.base_model or base_name(noted) or uploaded_base(s.model_dir, noted)
    if base is None:
        raise UserError(f"--base_model: {noted or 'the base'} is not the base's name on the hub: give it, as ORG/NAME")
    folder = base_folder(s.model_dir, noted)
    licence = s.license or licence_of(folder)
    if licence is None:
        raise UserError(f"--license: the folder of {base} has no model card with a licence: give it, as apache-2.0")
    return Card(s.repo_id, base, licence, is_adapter(s.model_dir), notes, run_dir, s.model_dir.resolve(), folder)


def uploaded_base(model_dir: Path, noted: str | None) -> str | None:
    """The base's name on the hub, if both files of an adapter name it, as only `make_folder` writes it; else None.

    Training notes the absolute path of a folder in the one.
    """
    if not is_adapter(model_dir) or noted is None or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", noted):
        return None
    return noted if read_json(model_dir / ADAPTER).get(BASE) == noted else None


def base_folder(model_dir: Path, noted: str | None) -> Path | None:
    """The folder of the base, if it is here."""
    try:
        return find_base(model_dir) if is_adapter(model_dir) else Path(noted) if noted else None
    except UserError:
        return None


def make_folder(s: Settings, card: Card, out_dir: Path) -> None:
    """Write what is uploaded: the model's files with no path of this machine in them, the card, the base's licence."""
    others = left_out(s.model_dir)
    with new_folder(out_dir) as folder:
        copy_model(s.model_dir, folder, card.base)
        if card.base_dir is not None:
            copy_legal_files(card.base_dir, folder)
        write_card(card, folder)  # in the place of the base's
    if others:
        print(f"left out of {s.model_dir}: {', '.join(others)}")


def upload(s: Settings, folder: Path) -> str:
    """Upload a folder in one commit, and return its address. The repository is made if it is not there."""
    import huggingface_hub
    from huggingface_hub import errors

    api = huggingface_hub.HfApi()
    try:
        repo_id = api.create_repo(s.repo_id, private=s.private, exist_ok=True).repo_id
        if s.revision is not None:
            api.create_branch(repo_id, branch=s.revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=s.revision, commit_message=s.message
        ).commit_url
    except Exception as error:  # each library below has its own: no network, refused, cut off
        refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403, 404)
        if refused or isinstance(error, errors.LocalTokenNotFoundError):
            raise UserError(f"--repo_id {s.repo_id}: refused: set HF_TOKEN to a token that may write there") from None
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"--repo_id {s.repo_id}: not uploaded ({reason}); the same command tries again") from None


if __name__ == "__main__":
    cli.run(main, settings)
