"""A conversion that is killed, runs out of disk or is interrupted: what remains, and that the next run goes on."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import convert_weights
from checkpoints import damage_tensors, run_python, snapshot
from conversion import staging, writing
from convert_weights import convert

NUM_SHARDS = 8  # of the source


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """Names of the shards that are written, as they are."""
    names = []

    def write_tensors(file, *arguments, real=writing.write_tensors):
        names.append(file.name)
        return real(file, *arguments)

    monkeypatch.setattr(writing, "write_tensors", write_tensors)
    return names


def stop_at_shard(number: int, error: BaseException, monkeypatch, source: Path, output: Path, **arguments) -> None:
    """Convert, and let `error` happen in the middle of the shard of this number, from 1 on."""
    with monkeypatch.context() as patch:
        shards = []

        def write_tensors(file, tensors, to_chunks, on_written, real=writing.write_tensors):
            shards.append(file)

            def stop(size):
                if len(shards) == number:
                    raise error

            return real(file, tensors, to_chunks, stop)

        patch.setattr(writing, "write_tensors", write_tensors)
        with pytest.raises(type(error)):
            convert(source, output, **arguments)


def finished_shards(output: Path) -> list[str]:
    return sorted(file.name for file in (staging.partial_folder(output) / "content").glob("*"))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_the_next_run_goes_on_after_the_last_finished_shard(error, source, tmp_path, monkeypatch, written):
    expected = snapshot(convert(source, tmp_path / "expected"))
    shutil.copytree(tmp_path / "expected", tmp_path / "out")
    old = snapshot(tmp_path / "out")
    stop_at_shard(4, error, monkeypatch, source, tmp_path / "out", seed=3, overwrite=True)
    assert snapshot(tmp_path / "out") == old  # the older checkpoint is there all the time
    assert finished_shards(tmp_path / "out") == [f"model-0000{i}-of-00008.safetensors" for i in (1, 2, 3)]
    assert not list(staging.partial_folder(tmp_path / "out").rglob("config.json"))

    written.clear()
    convert(source, tmp_path / "out", seed=3, overwrite=True)
    assert written == [f"model-0000{i}-of-00008.safetensors" for i in (4, 5, 6, 7, 8)]
    assert snapshot(convert(source, tmp_path / "again", seed=3)) | readme(tmp_path / "out") == snapshot(
        tmp_path / "out"
    )
    assert snapshot(tmp_path / "out") != old and snapshot(tmp_path / "expected") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "expected", "out", "source"]


def readme(folder: Path) -> dict[str, bytes]:
    """The model card, which names its folder."""
    return {"README.md": (folder / "README.md").read_bytes()}


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


SPOILED = {
    "a bit": lambda shard, progress: flip_a_bit(shard),
    "the end": lambda shard, progress: os.truncate(shard, 5000),
    "all of it": lambda shard, progress: shard.unlink(),
    "its line": lambda shard, progress: os.truncate(progress, progress.stat().st_size - 40),
    "its hash": lambda shard, progress: progress.write_text(progress.read_text()[:-5] + 'f"}\n'),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_shard_is_trusted_only_if_its_bytes_are_those_noted(what, source, tmp_path, monkeypatch, written):
    output = tmp_path / "out"
    stop_at_shard(4, OSError(), monkeypatch, source, output)
    partial = staging.partial_folder(output)
    SPOILED[what](partial / "content" / "model-00003-of-00008.safetensors", partial / "progress.jsonl")
    written.clear()
    convert(source, output)
    assert written == [f"model-0000{i}-of-00008.safetensors" for i in (3, 4, 5, 6, 7, 8)]
    assert snapshot(convert(source, tmp_path / "again")) | readme(output) == snapshot(output)


def touch(source: Path) -> dict:
    file = source / "model-00008-of-00008.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    return {}


def retrain(source: Path) -> dict:
    tensors = load_file(source / "model-00001-of-00008.safetensors")
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, source / "model-00001-of-00008.safetensors")
    return {}


def edit_config(source: Path) -> dict:
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["initializer_range"] = 0.03  # of the gates too
    (source / "config.json").write_text(json.dumps(config))
    return {}


CHANGED = {
    "time of a file": touch,
    "weights": retrain,
    "configuration": edit_config,
    "seed": lambda source: {"seed": 1},
    "gates": lambda source: {"gate_init": "selection"},
    "dtype": lambda source: {"dtype": "bfloat16"},
    "shards": lambda source: {"max_shard_size": "100KB"},
}


@pytest.mark.parametrize("what", CHANGED)
def test_another_source_or_other_options_start_over(what, source, tmp_path, monkeypatch, written):
    output = tmp_path / "out"
    stop_at_shard(4, OSError(), monkeypatch, source, output)
    options = CHANGED[what](source)
    written.clear()
    convert(source, output, **options)
    assert sorted(written) == sorted(file.name for file in output.glob("*.safetensors"))
    assert snapshot(convert(source, tmp_path / "again", **options)) | readme(output) == snapshot(output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out", "source"]


def test_what_is_finished_is_kept_where_the_output_turns_up_meanwhile(source, tmp_path, monkeypatch):
    output = tmp_path / "out"
    stop_at_shard(4, OSError(), monkeypatch, source, output)
    shutil.copytree(source, output)
    with pytest.raises(ValueError, match="exists; `overwrite`"):
        convert(source, output)
    assert len(finished_shards(output)) == 3


def test_nan_in_the_last_shard_leaves_nothing(source, tmp_path):
    file = source / "model-00008-of-00008.safetensors"
    tensors = load_file(file)
    key = sorted(tensors)[-1]
    tensors[key].view(-1)[7] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"model-00008-of-00008.safetensors: '{key}' holds NaN or infinite values"):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_source_that_changes_while_it_is_read_is_noticed(source, tmp_path, monkeypatch):
    def compare_headers(*arguments, real=writing.compare_headers):
        damage_tensors(source, lambda tensors: None)
        return real(*arguments)

    monkeypatch.setattr(writing, "compare_headers", compare_headers)
    with pytest.raises((ValueError, OSError)):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_small_a_disk_is_told_before_anything_is_written(pristine, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**6, 10**6, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(writing.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(OSError, match=r"needs [\d,]+ more bytes, its disk has 1,000 free") as caught:
            convert(pristine["old"], tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_while_a_shard_is_written(pristine, tmp_path):
    """A limit on the size of files makes the system cut a write short; then it is lifted, in the same process."""
    out = run_python(
        """
        import errno, resource, sys
        from pathlib import Path
        from convert_weights import convert

        source, output = map(Path, sys.argv[1:])
        finished = output.parent / ".out.partial" / "content"
        resource.setrlimit(resource.RLIMIT_FSIZE, (240_000, resource.RLIM_INFINITY))
        try:
            convert(source, output, max_shard_size="300KB")
        except OSError as error:
            assert error.errno == errno.EFBIG, error
        assert not output.exists()
        inodes = {file.name: file.stat().st_ino for file in finished.iterdir()}
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        convert(source, output, max_shard_size="300KB")
        assert {name: (output / name).stat().st_ino for name in inodes} == inodes
        print(*inodes)
        """,
        pristine["new"],
        tmp_path / "out",
    )
    assert out.split() == ["model-00001-of-00004.safetensors"]  # of 235, 271, 235 and 70 kB
    again = convert(pristine["new"], tmp_path / "again", max_shard_size="300KB")
    assert snapshot(again) | readme(tmp_path / "out") == snapshot(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out"]


def test_the_command_line_says_how_to_go_on(source, tmp_path, monkeypatch):
    stop_at_shard(4, OSError(), monkeypatch, source, tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", str(source), str(tmp_path / "out")])
    with monkeypatch.context() as patch:
        patch.setattr(writing, "compare_headers", lambda *arguments: os.stat("no such file"))
        with pytest.raises(SystemExit, match=r"Finished shards are kept in .*\.out\.partial: the same command goes on"):
            convert_weights.main()
    assert len(finished_shards(tmp_path / "out")) == NUM_SHARDS
    convert_weights.main()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_killed_at_any_moment_it_leaves_nothing_that_looks_whole_and_goes_on(pristine, tmp_path):
    """SIGKILL before each file system call and within each shard, onto nothing and onto an older checkpoint."""
    out = run_python(KILL_DRIVER, pristine["new sharded"], tmp_path)
    fresh, resumed, overwriting, resumed_overwriting = map(int, out.split())
    assert fresh > 70 and overwriting > 80, "too few moments: the driver no longer sees the converter's calls"
    assert resumed > 15 and resumed_overwriting > 15, "too few runs went on where a killed one had stopped"


# Each child process dies at the n-th event below the sandbox; then the folders are inspected and the run repeated.
KILL_DRIVER = """
    import json, os, signal, shutil, sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    import convert_weights
    from conversion import staging, writing

    source, sandbox = Path(sys.argv[1]), Path(sys.argv[2])
    os.fsync = lambda descriptor: None  # a killed process loses nothing that it has handed to the system
    CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}

    def snapshot(folder):
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def looks_whole(folder):
        try:
            return bool(json.loads((folder / "config.json").read_text()))
        except (OSError, ValueError):
            return False

    def run(output, overwrite, die_at=None):
        child = os.fork()
        if child == 0:
            events = pieces = 0

            def event(name, arguments):
                nonlocal events
                if name in CALLS and str(sandbox) in str(arguments[0]):
                    events += 1
                    if events == die_at:
                        os.kill(os.getpid(), signal.SIGKILL)

            class Bar(writing.tqdm):
                def update(self, n=1):
                    nonlocal pieces
                    pieces += 1
                    if pieces % 8 == 0:
                        event("open", [sandbox])

            writing.tqdm = Bar
            sys.addaudithook(event)
            try:
                convert_weights.convert(source, output, seed=2, overwrite=overwrite)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        return os.waitpid(child, 0)[1]

    def check(output, allowed):
        for file in sandbox.rglob("config.json"):
            if looks_whole(file.parent):
                assert snapshot(file.parent) in allowed, (file, sorted(snapshot(file.parent)))
        assert output.exists() or len(allowed) == 1 or (sandbox / f".{output.name}.replaced").exists()

    def finished(output):
        '''Shards that a killed run has noted as finished, with their inodes.'''
        partial = staging.partial_folder(output)
        try:
            lines = (partial / "progress.jsonl").read_text().splitlines()[1:]
            names = [json.loads(line)["name"] for line in lines]
            return {name: (partial / "content" / name).stat().st_ino for name in names}
        except FileNotFoundError:
            return {}

    older = sandbox.parent / (sandbox.name + "-older") / "out"
    reference = {}
    for seed in (2, 1):
        convert_weights.convert(source, older, seed=seed, overwrite=True)
        reference[seed] = snapshot(older)
    assert reference[1] != reference[2]

    # Planning writes nothing: done once, so that the children get to the writing at once.
    origin = convert_weights.open_source(source, None, ())
    plan = convert_weights.make_plan(origin, convert_weights.Options(seed=2))
    fingerprint = plan.fingerprint()
    type(plan).fingerprint = lambda plan: fingerprint
    convert_weights.make_plan = lambda *arguments: plan

    output = sandbox / "out"
    for overwrite in (False, True):
        moment = resumed = 0
        while True:
            moment += 1
            for left in sandbox.iterdir():
                shutil.rmtree(left)
            if overwrite:
                shutil.copytree(older, output)
            status = run(output, overwrite, die_at=moment)
            check(output, [reference[2]] + [reference[1]] * overwrite)
            if status == 0:
                break
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
            in_flux = (sandbox / ".out.replaced").exists()
            if moment % 3 == 0 or in_flux:
                done = output.exists() and snapshot(output) == reference[2]
                kept = {} if done else finished(output)
                assert run(output, overwrite or done) == 0
                assert snapshot(output) == reference[2]
                assert {name: (output / name).stat().st_ino for name in kept} == kept, "a finished shard was redone"
                assert [p.name for p in sandbox.iterdir()] == ["out"], list(sandbox.iterdir())
                resumed += bool(kept)
        print(moment - 1, resumed)
        assert snapshot(output) == reference[2]
"""
