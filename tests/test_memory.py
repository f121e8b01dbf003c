"""B59, A21: short of memory it gives back first, then lets nobody in, and recovers by itself; pools that cannot fit."""

import contextlib
import ctypes
import mmap
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from process_kit import Process, until
from service_kit import chat_body, raw_request, read_until, served
from step_kit import figure

from config import UserError
from service.memory import MemoryGuard, Pressure, check_room, collect_and_trim, pool_bytes
from weights.room import OWN, Room, rooms, tightest

GB = 1_000_000_000
FILES = {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 500\ninactive_file 200\nslab 1\n"}
OLD_FILES = {
    "memory.limit_in_bytes": "1000\n", "memory.usage_in_bytes": "700\n",
    "memory.stat": "inactive_file 1\ntotal_inactive_file 200\n",
}  # fmt: skip


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


# ---- the marks


def test_each_mark_is_met_higher_than_it_is_left():
    share, now = [0.0], Clock()
    guard = MemoryGuard(lambda: share[0], now, givers=[])
    found = []
    for share[0] in (0.5, 0.919, 0.92, 0.949, 0.95, 0.93, 0.919, 0.901, 0.9, 0.899, 0.91, 0.96, 0.89, 0.92):
        found.append(guard.look().name[0])
    assert "".join(found) == "EETTSSTTTEESET" and guard.share == 0.92 and guard.tight


def test_while_it_is_tight_something_is_given_back_now_and_then(caplog):
    share, now, gave = [0.93], Clock(), []
    guard = MemoryGuard(lambda: share[0], now, givers=[lambda: gave.append(now.now_s), lambda: gave.append("too")])
    for now.now_s in (0.0, 1.0, 9.9, 10.0, 15.0, 20.0):
        guard.look()
    assert gave == [0.0, "too", 10.0, "too", 20.0, "too"]
    share[0], now.now_s = 0.5, 100.0
    guard.look()
    assert len(gave) == 6 and guard.pressure is Pressure.EASY and not guard.tight
    assert [record.getMessage() for record in caplog.records] == [
        "memory is tight: connections are not kept, and what can be spared is given back (93 % used)",
        "there is enough memory again (50 % used)",
    ]
    assert MemoryGuard(lambda: 0.0, now).givers == [collect_and_trim]


def test_the_allocators_reserves_go_back_every_minute_however_much_memory_there_is():
    now, trimmed = Clock(), []
    guard = MemoryGuard(lambda: 0.1, now, givers=[], trim=lambda: trimmed.append(now.now_s))
    for now.now_s in range(0, 200, 7):
        guard.look()
    assert trimmed == [63, 126, 189] and not guard.tight


# ---- the limits there are


def written(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_a_limit_counts_at_the_group_and_at_those_above_it(tmp_path):
    own = tmp_path / "own"
    own.write_text("0::/system.slice/llm.service\n")
    written(tmp_path / "system.slice/llm.service", FILES | {"memory.max": "max\n"})
    written(tmp_path / "system.slice", FILES)
    _, found = rooms(tmp_path, own)
    assert (found.used, found.most, found.share, found.free) == (500, 1000, 0.5, 500)
    assert found.whose == f"the control group {tmp_path / 'system.slice'}"
    written(tmp_path / "system.slice/llm.service", FILES | {"memory.max": "800\n"})
    assert [room.most for room in rooms(tmp_path, own)[1:]] == [800, 1000]
    written(tmp_path / "system.slice/llm.service", FILES | {"memory.max": "501\n"})
    assert tightest(tmp_path, own).most == 501


def test_version_1_and_both_at_once(tmp_path):
    own = tmp_path / "own"
    own.write_text("9:name=systemd:/\n4:memory:/docker/abc\n1:cpu,cpuacct:/\n0::/\n")
    written(tmp_path / "memory", OLD_FILES)  # in a container its group is the root, whatever its path is outside
    _, found = rooms(tmp_path, own)
    assert (found.used, found.most) == (500, 1000)
    written(tmp_path / "memory", OLD_FILES | {"memory.limit_in_bytes": "9223372036854771712\n"})
    assert [room.whose for room in rooms(tmp_path, own)] == ["the machine"], "that number says: none"


@pytest.mark.parametrize("content", [None, "", "0::/\n", "4:cpu:/\n"])
def test_without_a_group_the_machine_is_the_limit(tmp_path, content):
    own = tmp_path / "own"
    if content is not None:
        own.write_text(content)
    assert tightest(tmp_path, own).whose == "the machine" and 0 < tightest(tmp_path, own).share < 1


def test_a_group_that_cannot_be_read_is_none(tmp_path):
    own = tmp_path / "own"
    own.write_text("0::/\n")
    written(tmp_path, FILES | {"memory.stat": "anon 500\n"})
    assert len(rooms(tmp_path, own)) == 1
    assert rooms()[0].whose == "the machine", "and the real ones can be read here"


# ---- a pool that cannot fit


def test_a_pool_that_fits_is_not_spoken_of():
    assert check_room([Room(2 * GB, 10 * GB, "the machine"), Room(GB, 5 * GB, "a group")], 3 * GB) is None


def test_a_pool_that_will_shut_the_door_is_warned_of_with_one_that_would_not():
    said = check_room([Room(2 * GB, 100 * GB, "the machine"), Room(2 * GB, 10 * GB, "the control group /x")], 7.5 * GB)
    assert said == (
        "2.00 GB are used with the weights loaded, keys and values may take 7.50 GB more, and the control group /x has "
        "10.00 GB: nobody would be let in once they are full; --kv-memory 7.00 would be safe."
    )


@pytest.mark.parametrize(("used", "advice"), [(2, "--kv-memory 7.00 would be safe"), (9.5, "give it more memory")])
def test_a_pool_that_cannot_fit_is_refused_at_the_start(used, advice):
    with pytest.raises(UserError) as why:
        check_room([Room(int(used * GB), 10 * GB, "the machine")], 9 * GB)
    assert str(why.value).endswith(f"and the machine has 10.00 GB: {advice}.")


def test_the_pool_is_all_blocks_and_none_of_it_here_when_it_is_on_a_gpu():
    about = {"kv_blocks": 100, "kv_bytes_per_token": 1000, "device": "cpu"}
    assert pool_bytes(about) == 1_600_000 and pool_bytes(about | {"device": "cuda"}) == 0


# ---- the service


@pytest.mark.slow
def test_b59_from_the_lower_mark_prefixes_go_and_connections_are_not_kept(checkpoint_folder):
    used = [0.5]
    with served(checkpoint_folder, memory_used=lambda: used[0], result_cache_bytes=100_000) as here:

        def cached() -> int:
            return here.complete(list(range(60, 100))).json["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert (cached(), cached()) == (0, 32)
        here.until(lambda: here.house.serving.relief.results.bytes > 0, "for the probe's answer")
        with here.open() as idle, here.open() as kept:
            kept.sendall(raw_request("/v1/chat/completions", chat_body()))
            assert b"connection: close" not in read_until(kept, b'"usage"').lower()
            used[0] = 0.93
            here.until(lambda: here.house.watch.memory.tight)
            assert idle.recv(1) == kept.recv(1) == b"", "nor are those that wait for a next request"
        here.until(lambda: not here.bridge.dropping)
        assert cached() == 0, "what nobody held was given back"
        assert here.house.serving.relief.results.bytes == 0, "and so are kept answers"
        reply = here.chat()
        assert (reply.status, reply.headers["connection"]) == (200, "close") and figure(here, "memory_tight") == 1
        assert here.ask("/health/ready").status == 200 and figure(here, "memory_used_ratio") == 0.93
        used[0] = 0.89
        here.until(lambda: not here.house.watch.memory.tight)
        assert "connection" not in here.chat().headers and cached() == 32


@pytest.mark.slow
def test_what_an_engine_gives_back_the_system_has_and_no_request_misses(checkpoint_folder):
    """Keys and values that nobody holds used to stay in memory for ever: the process grew to its whole pool."""
    from engine.load import load
    from engine.request import Sampling
    from engine.settings import EngineConfig

    config = EngineConfig(model=str(checkpoint_folder), kv_memory=0.2, max_running=64, native="wait")
    engine = load(config).engine
    if engine.give_back.__name__ != "give_back":
        pytest.skip("the C forward pass could not be compiled here: the PyTorch one does not give back")
    network = engine.give_back.__self__
    prompts = [[i % 250 + 1] * (engine.context - 20) for i in range(60)]
    wish = Sampling(max_new_tokens=4)
    first = [answer.tokens for answer in engine.generate(prompts, wish)]
    full = in_memory(network.keys, network.values)
    asked = engine.submit(prompts[7], Sampling(max_new_tokens=12))
    while len(asked.choices) < 4:
        engine.step()
    engine.drop_cache()
    left = in_memory(network.keys, network.values)
    assert full > 2 * MEBIBYTE, "there was something to give back"
    assert 0 < left < 0.1 * full, "all but what the running request holds"
    assert asked.result().tokens[:4] == first[7]
    again = engine.generate(prompts, wish)
    assert [answer.tokens for answer in again] == first and again[0].request.reused == 0


MEBIBYTE = 1 << 20


def in_memory(*tensors: torch.Tensor) -> int:
    """Bytes of these tensors' pages that the system holds for them (mincore(2)), whatever else the process holds."""
    held = 0
    for tensor in tensors:
        first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        pages = (ctypes.c_ubyte * -(-(tensor.data_ptr() + tensor.nbytes - first) // mmap.PAGESIZE))()
        assert (
            ctypes.CDLL(None).mincore(ctypes.c_void_p(first), ctypes.c_size_t(len(pages) * mmap.PAGESIZE), pages) == 0
        )
        held += sum(page & 1 for page in pages) * mmap.PAGESIZE
    return held


# ---- a real limit

HOG = "import sys; held = bytearray(b'x') * int(sys.argv[1]); print(flush=True); sys.stdin.read()"


@contextlib.contextmanager
def control_group(name: str):
    """(its folder, its limit's file, its usage's file). Skips where none can be made."""
    lines = [line.split(":", 2) for line in OWN.read_text().splitlines()] if OWN.exists() else []
    places = {"memory" if "memory" in one.split(",") else one: path for _, one, path in lines}
    old = "memory" in places
    folder = Path("/sys/fs/cgroup") / ("memory" if old else "") / places.get("memory", places.get("", "")).lstrip("/")
    folder /= name
    limit, usage = ("limit_in_bytes", "usage_in_bytes") if old else ("max", "current")
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here ({error.strerror})")
    try:
        if not (folder / f"memory.{limit}").exists():
            pytest.skip("control groups have no memory controller here")
        yield folder, folder / f"memory.{limit}", folder / f"memory.{usage}"
    finally:
        until(lambda: not (folder / "cgroup.procs").read_text(), "for the group to be empty")
        folder.rmdir()


@pytest.mark.slow
def test_b59_in_a_real_control_group_it_sheds_recovers_and_is_not_killed(checkpoint_folder, tmp_path):
    with control_group(f"llm-test-{threading.get_native_id()}") as (folder, limit, usage):
        process = Process(checkpoint_folder, place=tmp_path)
        hog = None
        try:
            (folder / "cgroup.procs").write_text(str(process.popen.pid))
            process.ready()
            used = int(usage.read_text())
            most = int(used / 0.8)
            limit.write_text(str(most))
            assert process.ask("/v1/chat/completions", chat_body()).status == 200
            hog = subprocess.Popen(
                [sys.executable, "-c", HOG, str(int(0.975 * most) - used)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=lambda: join(folder),
            )  # fmt: skip
            hog.stdout.readline()
            until(lambda: process.ask("/health/ready").json["reason"] == "memory", "for it to see that")
            refused = process.ask("/v1/chat/completions", chat_body())
            assert (refused.status, refused.error["details"]["limit_hit"]) == (503, "memory")
            assert refused.headers["connection"] == "close"
            hog.kill()
            hog.wait()
            until(lambda: process.ask("/health/ready").status == 200, "for it to recover")
            assert process.ask("/v1/chat/completions", chat_body()).status == 200
            assert process.popen.poll() is None
        finally:
            for one in (hog, process.popen):
                if one is not None:
                    one.kill()
                    one.communicate()
            process.close()


def join(folder: Path) -> None:
    (folder / "cgroup.procs").write_text("0")
