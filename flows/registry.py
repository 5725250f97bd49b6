"""MLflow's model registry: a new version of a model that passed the gate."""

from pathlib import Path

from shell.files import read_json
from tracking.sending import state_path


def register(run_dir: Path, model_dir: Path, name: str, tags: dict[str, str]) -> str:
    """Add a folder with a model to the MLflow run of a run's folder, and register it as a new version of `name`.

    Returns the version. The run must have been followed by MLflow (finetune.py --logger mlflow).
    """
    import mlflow

    own = read_json(state_path(run_dir, "mlflow"))["own"]
    client = mlflow.MlflowClient(own["uri"])
    client.log_artifacts(own["run"], str(model_dir), "model")
    try:
        client.create_registered_model(name)
    except mlflow.exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"{client.get_run(own['run']).info.artifact_uri}/model"
    return client.create_model_version(name, source, own["run"], tags=tags).version
