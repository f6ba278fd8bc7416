"""`nldist export`: timm alone, MLflow's own server and its store give what `nldist predict` gives."""

import base64
import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open

import nldist.cli
from nldist.errors import UserError
from nldist.models import Network, build_model
from nldist.models.plain import plain_state
from nldist.run.directory import RunDirectory, networks_of
from tests.commands import Command, Done
from tests.jobs import run_job
from tests.mlflow_server import Server, wait_for
from tests.ranks import free_port

EXTENSIONS = ("safetensors", "pt")


def command(tmp_path: Path, *arguments: object) -> Done:
    return Command(nldist.cli.main, arguments, tmp_path / "told", os.environ).wait()


def done(tmp_path: Path, *arguments: object) -> str:
    ended = command(tmp_path, *arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def train(few_digits: Path, run_dir: Path, *settings: str) -> Path:
    arguments = (f"data.root={few_digits}", "train.epochs=2", "method.dividemix.warmup_epochs=1", *settings)
    assert run_job(run_dir, *arguments) == [0]
    return run_dir


@pytest.fixture(scope="module")
def run_dir(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two networks of our own."""
    return train(few_digits, tmp_path_factory.mktemp("export") / "run")


@pytest.fixture(scope="module")
def timm_run(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one network of timm's."""
    settings = ("method.name=cross_entropy", "model.name=resnet10t", "train.epochs=1", "optim.schedule=step")
    return train(few_digits, tmp_path_factory.mktemp("export") / "timm", *settings)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "picture.png"
    pixels = torch.randint(256, (12, 9, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    Image.fromarray(pixels.numpy()).save(file)
    return file


def networks(run_dir: Path) -> list[Network]:
    return networks_of(RunDirectory(run_dir).load_weights("last"))


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_timm_alone_reads_it(timm_run: Path, extension: str, tmp_path: Path) -> None:
    out = tmp_path / f"net.{extension}"
    done(tmp_path, "export", timm_run, out)
    model = timm.create_model("resnet10t", num_classes=10, checkpoint_path=str(out)).eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), networks(timm_run)[0].logits(images))
    classes = [str(digit) for digit in range(10)]
    if extension == "pt":
        saved = torch.load(out, weights_only=True)
        timm.create_model("resnet10t", num_classes=10).load_state_dict(saved["state_dict"], strict=True)
        assert (saved["label_names"], saved["mean"]) == (classes, [0.305] * 3)
    else:
        with safe_open(out, "pt") as file:
            facts = file.metadata()
        assert json.loads(facts["label_names"]) == classes
        assert (facts["architecture"], json.loads(facts["view"])) == ("resnet10t", [{"op": "center_crop", "size": 8}])


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_one_of_two_own_networks(run_dir: Path, extension: str, tmp_path: Path) -> None:
    out = tmp_path / f"net.{extension}"
    done(tmp_path, "export", run_dir, out, "--network", 1)
    again = build_model("small_cnn", 10, pretrained=out).eval()
    images = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(again.logits(images), networks(run_dir)[1].logits(images))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "deit_tiny_distilled_patch16_224", "dla34"])
def test_heads_of_every_kind(name: str) -> None:
    """A linear one, within a module, two of them, a convolution."""
    network = build_model(name, 7).eval()
    model = timm.create_model(name, num_classes=7).eval()
    model.load_state_dict(plain_state(network, name), strict=True)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(images), network.logits(images), rtol=1e-4, atol=1e-5)


def test_a_head_that_timm_does_not_have() -> None:
    with pytest.raises(UserError, match="timm's own levit_128s has another head"):
        plain_state(build_model("levit_128s", 7).eval(), "levit_128s")


def test_what_is_refused(run_dir: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.pt"
    there.write_text("mine")
    for words, told in (
        ([], "give OUT"),
        ([tmp_path / "a.pt", "--mlflow"], "give OUT"),
        ([there, "--network", 0], "exists"),
        ([tmp_path / "none" / "a.pt"], "no directory"),
        ([tmp_path / "a.pt"], "has 2 networks and such a file holds one"),
        ([tmp_path / "a.pt", "--network", 2], "has 2"),
        ([tmp_path / "model", "--network", 0], "--network is for"),
        (["--mlflow"], "MLflow has no run of"),
    ):
        ended = command(tmp_path, "export", run_dir, *words)
        assert ended.returncode == 2, words
        assert told in ended.stderr.splitlines()[-1]
    assert there.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir() if path.name != "told"] == ["there.pt"]


def predicted(tmp_path: Path, run_dir: Path, picture: Path) -> dict[str, str]:
    text = done(tmp_path, "predict", run_dir, picture, "--top", 3, "dist.device=cpu")
    (row,) = csv.DictReader(io.StringIO(text))
    return row


def assert_answer(answer: dict[str, Any], row: dict[str, str]) -> None:
    for name in ("label", "label_2", "label_3"):
        assert answer[name] == row[name]
    assert answer["label_id"] == int(row["label_id"])
    for name in ("probability", "probability_2", "probability_3"):
        assert answer[name] == pytest.approx(float(row[name]), abs=1e-6)


@pytest.fixture
def ask(run_dir: Path, tmp_path: Path) -> Iterator[Callable[[Any], tuple[int, Any]]]:
    """Ask `mlflow models serve`, which serves the run's model."""
    done(tmp_path, "export", run_dir, tmp_path / "model")
    port, log = free_port(), (tmp_path / "serve.log").open("wb")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # it starts uvicorn by its name
    words = ["mlflow", "models", "serve", "-m", str(tmp_path / "model"), "-p", str(port), "--env-manager", "local"]
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        stdout=log,
        stderr=log,
        env={**os.environ, "PATH": path, "MLFLOW_DISABLE_TELEMETRY": "true", "CUDA_VISIBLE_DEVICES": ""},
        start_new_session=True,
    )

    def post(path: str, body: Any) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError:
            return 0, b""

    try:
        wait_for(lambda: process.poll() is not None or post("ping", None)[0] == 200, 180)
        assert process.poll() is None, (tmp_path / "serve.log").read_text()
        yield lambda body: post("invocations", body)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
        log.close()


def test_mlflow_serves_it(ask: Callable[[Any], tuple[int, Any]], run_dir: Path, picture: Path, tmp_path: Path) -> None:
    encoded = base64.b64encode(picture.read_bytes()).decode()
    body = {"dataframe_split": {"columns": ["image"], "data": [[encoded], [encoded]]}, "params": {"top": 3}}
    status, answer = ask(body)
    assert status == 200, answer
    first, second = json.loads(answer)["predictions"]
    assert_answer(first, predicted(tmp_path, run_dir, picture))
    assert second["label"] == first["label"]
    status, answer = ask({"dataframe_records": [{"image": encoded}]})
    assert status == 200, answer
    assert json.loads(answer)["predictions"][0].keys() == {"label", "label_id", "probability"}
    damaged = base64.b64encode(b"no image").decode()
    status, answer = ask({"dataframe_records": [{"image": encoded}, {"image": damaged}]})
    assert status == 400
    assert "image 1: not an image of a known kind" in json.loads(answer)["message"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # MLflow's, of its own code
@pytest.mark.parametrize("store", ["file", "server"])
def test_the_model_is_in_the_run_of_the_training(
    store: str, server: Server, few_digits: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path}/m.db"
    if store == "server":
        server.start()
        uri = server.uri
    run_dir = train(
        few_digits, tmp_path / "run", "track.enabled=true", f"track.uri={uri}", "track.system_metrics=false"
    )
    told = done(tmp_path, "export", run_dir, "--mlflow")
    run_id = json.loads((run_dir / ".mlflow.json").read_text())["run_id"]
    assert told.startswith(f"runs:/{run_id}/model ")
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    model = mlflow.pyfunc.load_model(f"runs:/{run_id}/model")
    assert model.metadata.get_input_schema().input_names() == ["image"]
    answer = model.predict(pa.table({"image": [picture.read_bytes()]}).to_pandas(), params={"top": 3})
    assert_answer(answer.iloc[0].to_dict(), predicted(tmp_path, run_dir, picture))
    assert mlflow.MlflowClient(uri).get_run(run_id).info.status == "FINISHED", "as it was"
    done(tmp_path, "export", run_dir, tmp_path / "model")
    assert uri not in (tmp_path / "model" / "data" / "run" / "config.yaml").read_text(), "it may hold a password"
    if store == "server":
        server.kill()
        ended = command(tmp_path, "export", run_dir, "--mlflow")
        assert ended.returncode == 2
        assert f"MLflow at {uri} did not take the model" in ended.stderr.splitlines()[-1]
