"""`pagedlab data`: a download is whole and what was published, or it leaves nothing behind."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pagedlab import cli, workloads
from pagedlab.errors import WorkloadError
from pagedlab.workloads import data
from pagedlab.workloads.catalogue import DATASETS, Dataset
from pagedlab.workloads.data import Catalogue, fetch

DATA = Path(os.environ.get("PAGEDLAB_DATA") or Path(__file__).parents[2] / "shared" / "data")
ROW = {"timestamp": 0, "input_length": 5, "output_length": 2, "hash_ids": [0]}
BODY = b"".join(json.dumps({**ROW, "timestamp": i}).encode() + b"\n" for i in range(2000))


class Server(ThreadingHTTPServer):
    """Serves `files` by path; what it does wrong is up to `fault`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.fault: dict[str, str] = {}
        self.asked: list[str] = []

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        fault = self.server.fault.get(self.path, "")
        body = self.server.files.get(self.path)
        if body is None or fault == "error":
            self.send_error(500 if fault == "error" else 404)
            return
        if fault == "wrong":
            body = body.replace(b"5", b"6")
        self.send_response(200)
        if fault != "no length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault in ("cut", "no length"):
            body = body[: len(body) // 2]
        self.wfile.write(body)
        if fault == "cut":
            self.wfile.flush()
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def dataset(name: str, *files: str) -> Dataset:
    sha = hashlib.sha256(BODY).hexdigest()
    return Dataset(
        name=name,
        summary="A test.",
        format="mooncake",
        licence="none",
        repository="who/what",
        local=f"{name}.jsonl",
        commit="c0ffee",
        files=tuple((f, sha) for f in files),
    )


@pytest.fixture
def catalogue(server: Server) -> Catalogue:
    one, many = dataset("one", "traces/one.jsonl"), dataset("many", *(f"t/{i}.jsonl" for i in range(4)))
    for d in (one, many):
        for path, _ in d.files:
            server.files[f"/who/what/c0ffee/{path}"] = BODY
    return Catalogue((one, many, replace(one, name="never", commit=None)), server.base)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PAGEDLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PAGEDLAB_DATA", "nowhere")
    return tmp_path / "cache"


def everything(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_fetched_once(server: Server, catalogue: Catalogue, cache: Path, tmp_path: Path) -> None:
    path, fetched = fetch("one", catalogue=catalogue)
    assert fetched
    assert path == cache / "one" / "one.jsonl"
    assert path.read_bytes() == BODY
    assert fetch("one", catalogue=catalogue) == (path, False)
    assert server.asked == ["/who/what/c0ffee/traces/one.jsonl"]
    assert everything(cache) == ["one", "one/one.jsonl"]
    other, fetched = fetch("one", tmp_path / "new" / "folder", catalogue=catalogue)
    assert (other, fetched) == (tmp_path / "new/folder/one.jsonl", True)
    assert len(workloads.load(other)) == 2000


def test_a_set_of_files_is_a_folder(server: Server, catalogue: Catalogue, cache: Path) -> None:
    path, fetched = fetch("many", catalogue=catalogue)
    assert (path, fetched) == (cache / "many" / "many", True)
    assert everything(path) == [f"{i}.jsonl" for i in range(4)]
    assert path.stat().st_mode & 0o777 == 0o755
    assert fetch("many", catalogue=catalogue) == (path, False)
    assert len(server.asked) == 4


@pytest.mark.parametrize("fault", ["cut", "no length", "wrong", "error", "missing"])
@pytest.mark.parametrize("name", ["one", "many"])
def test_a_failed_download_leaves_nothing(
    server: Server, catalogue: Catalogue, cache: Path, fault: str, name: str, tmp_path: Path
) -> None:
    broken = [p for p in server.files if ("one" in p) == (name == "one")][-1]
    if fault == "missing":
        del server.files[broken]
    else:
        server.fault[broken] = fault
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes").write_text("keep")
    for to in (None, mine):
        with pytest.raises(WorkloadError) as caught:
            fetch(name, to, catalogue=catalogue)
        assert "\n" not in str(caught.value)
        assert broken in str(caught.value)
        assert "nothing was kept" in str(caught.value)
    assert not cache.exists()
    assert everything(mine) == ["notes"]
    server.files[broken] = BODY
    server.fault.clear()
    assert fetch(name, mine, catalogue=catalogue)[1]


def test_an_unreachable_host(catalogue: Catalogue, cache: Path) -> None:
    nowhere = replace(catalogue, base="http://127.0.0.1:9")
    with pytest.raises(WorkloadError, match="cannot fetch"):
        fetch("one", catalogue=nowhere)
    assert not cache.exists()


def test_an_interrupt_leaves_nothing(
    catalogue: Catalogue, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pooch

    def pressed(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pooch, "retrieve", pressed)
    with pytest.raises(KeyboardInterrupt):
        fetch("many", catalogue=catalogue)
    assert not cache.exists()


def test_damage_in_the_cache_is_repaired_and_a_persons_file_is_left_alone(
    server: Server, catalogue: Catalogue, tmp_path: Path
) -> None:
    path, _ = fetch("one", catalogue=catalogue)
    path.write_bytes(BODY[:100])
    server.fault["/who/what/c0ffee/traces/one.jsonl"] = "cut"
    with pytest.raises(WorkloadError):
        fetch("one", catalogue=catalogue)
    assert path.read_bytes() == BODY[:100]
    server.fault.clear()
    assert fetch("one", catalogue=catalogue) == (path, True)
    assert path.read_bytes() == BODY
    folder, _ = fetch("many", catalogue=catalogue)
    (folder / "2.jsonl").unlink()
    assert fetch("many", catalogue=catalogue) == (folder, True)
    (tmp_path / "one.jsonl").write_text("mine")
    with pytest.raises(WorkloadError, match="move it away first"):
        fetch("one", tmp_path, catalogue=catalogue)
    assert (tmp_path / "one.jsonl").read_text() == "mine"


def test_refusals(catalogue: Catalogue, tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="did you mean 'one'"):
        fetch("ones", catalogue=catalogue)
    with pytest.raises(WorkloadError, match="cannot be fetched"):
        fetch("never", catalogue=catalogue)
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkloadError, match="cannot make the folder"):
        fetch("one", tmp_path / "file" / "below", catalogue=catalogue)


# ---- the command line ----------------------------------------------------------------------------------------------


def test_the_commands(catalogue: Catalogue, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CATALOGUE", catalogue)
    runner = CliRunner()
    failed = runner.invoke(cli.app, ["data", "fetch", "ones"])
    assert failed.exit_code == 2
    assert len(failed.stderr.splitlines()) == 1
    for said in ("one.jsonl\n", "one.jsonl (was there)\n"):
        done = runner.invoke(cli.app, ["data", "fetch", "one"])
        assert done.exit_code == 0, done.output
        assert done.stdout.endswith(said)
    listed = json.loads(runner.invoke(cli.app, ["data", "list", "--json"]).stdout)["results"]
    assert [(r["name"], r["here"], r["fetch"]) for r in listed][:2] == [
        ("one", True, True),
        ("many", False, True),
    ]
    assert listed[0]["size"] == len(BODY)
    text = runner.invoke(cli.app, ["data", "list"]).stdout
    assert "pagedlab data fetch many" in text
    assert "not here" in text
    assert len(workloads.load("one")) == 2000


def test_a_failed_fetch_is_one_line_and_exit_2(
    server: Server, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "CATALOGUE", catalogue)
    server.files.clear()
    failed = CliRunner().invoke(cli.app, ["data", "fetch", "one"])
    assert failed.exit_code == 2
    assert failed.stdout == ""
    assert len(failed.stderr.splitlines()) == 1


# ---- what is known -------------------------------------------------------------------------------------------------


def test_the_catalogue_is_sound() -> None:
    names = [d.name for d in DATASETS]
    assert len(set(names)) == len(names)
    assert not set(names) & {row["name"] for row in workloads.list_workloads()}
    for d in DATASETS:
        assert d.format in workloads.traces.FORMATS
        assert (d.commit is None) == (not d.files)
        assert len({path for path, _ in d.files}) == len(d.files)
        if d.commit is not None:
            assert len(d.commit) == 40
        for path, sha in d.files:
            assert len(sha) == 64
            assert int(sha, 16)
            assert not path.startswith("/")


def test_the_files_at_hand_are_those_that_would_be_fetched() -> None:
    if not DATA.is_dir():
        pytest.skip(f"no real traces: PAGEDLAB_DATA is not set and {DATA} is not there")
    for d in DATASETS:
        local = DATA / d.local
        if len(d.files) == 1 and local.is_file():
            assert hashlib.sha256(gzip.decompress(local.read_bytes())).hexdigest() == d.files[0][1]
        elif d.files and local.is_dir():
            for path, sha in d.files:
                file = local / (path.rpartition("/")[2] + ".gz")
                assert hashlib.sha256(gzip.decompress(file.read_bytes())).hexdigest() == sha


def test_pooch_is_loaded_only_for_a_download() -> None:
    code = "import sys, pagedlab.workloads as w; w.load('zipf'); w.list_workloads(); print('pooch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "False"
