"""The web page without a browser: who may use what, for how long, and what a client that is no browser gets."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

pytest.importorskip("gradio", reason="the page needs gradio: pip install -e '.[app]'")

import gradio as gr
from app_testing import SECONDS, PageClient, PageServer, request

import app
import page.routes
from page import views
from page.examples import draw_examples
from page.jobs import WENT_WRONG, Jobs, for_visitors
from page.model_room import Done, Line, LineFull, ModelRoom, Settings, Stopped, Waiting
from page.routes import container_suffix, is_what_it_seems, shown_name
from page.visitors import KeptReading, Limits, Refused, Video, Visitors
from synthetic.drawing import write_video
from synthetic.scenes import parse_answer

TINY = ROOT / "checkpoints" / "tiny"
CHUNK = 32


@pytest.fixture(scope="module")
def room():
    return ModelRoom(TINY, "cpu", "auto", CHUNK, waiting=4)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return draw_examples(tmp_path_factory.mktemp("examples"))


def finish(items):
    """The result of a reading or an answer, and all that came before."""
    *before, last = items
    assert isinstance(last, Done)
    return last.result, before


def here(reading):
    """It was not dropped."""
    return lambda: reading


class TestLine:
    def test_first_come_first_served(self):
        line, served = Line(limit=3), []
        places = {number: [] for number in range(3)}

        def visit(number):
            with line.turn(threading.Event(), places[number].append):
                # Until all are there, and the last has seen the line move.
                while len(places[2]) < number + 1 and number < 2:
                    time.sleep(0.001)
                served.append(number)

        threads = [threading.Thread(target=visit, args=(number,)) for number in range(3)]
        for number, thread in enumerate(threads):
            thread.start()
            while len(line._tickets) + len(served) <= number:
                time.sleep(0.001)
        for thread in threads:
            thread.join(SECONDS)
        assert served == [0, 1, 2]
        assert places == {0: [], 1: [Waiting(1)], 2: [Waiting(2), Waiting(1)]}

    def test_whoever_stops_leaves_the_line(self):
        line, stop = Line(limit=3), threading.Event()
        with line.turn(threading.Event(), print):
            with pytest.raises(Stopped), line.turn(stop, lambda _: stop.set()):
                raise AssertionError("it was not its turn")
            assert len(line._tickets) == 1

    def test_full(self):
        line = Line(limit=0)
        with line.turn(threading.Event(), print), pytest.raises(LineFull), line.turn(threading.Event(), print):
            pass
        with line.turn(threading.Event(), print):  # it is free again
            pass


class TestRoom:
    def test_examples_are_answered_rightly(self, room, examples):
        for video, questions in examples:
            reading, progress = finish(room.read(video.path, room.default, threading.Event()))
            assert progress[0].tokens % CHUNK == 0 and progress[0].total_tokens == reading.num_tokens
            for question in questions:
                answer, pieces = finish(room.ask(here(reading), room.default, question.text, 16, threading.Event()))
                assert parse_answer(answer.text, question.choices) == question.answer, question
                assert "".join(pieces) == answer.text

    def test_settings_belong_to_a_turn(self, room, examples):
        video, before = examples[0][0], (room.model.config.nsa_mode, room.model.config.block_counts)
        dense = Settings(2.0, 4, "dense", 2)
        wide = Settings(2.0, 4, "sparse", 8)
        plans = [room.plan(video.path, settings) for settings in (room.default, wide, dense)]
        assert plans[0].attention_share < plans[1].attention_share and plans[2].attention_share == 1
        for settings in (dense, wide):
            reading, _ = finish(room.read(video.path, settings, threading.Event()))
            assert reading.settings["nsa_mode"] == settings.nsa_mode
            assert reading.plan == room.plan(video.path, settings)
            finish(room.ask(here(reading), settings, "How many stars are there?", 4, threading.Event()))
            assert (room.model.config.nsa_mode, room.model.config.block_counts) == before

    def test_a_plan_does_not_wait(self, room, examples):
        video = examples[0][0]
        with room.line.turn(threading.Event(), print):
            room.model.config.nsa_mode = "dense"  # as in somebody's turn
            try:
                assert room.plan(video.path, room.default).attention_share < 1
            finally:
                room.model.config.nsa_mode = "sparse"

    def test_stopping_keeps_what_was_read(self, room, examples):
        stop = threading.Event()
        items = room.read(examples[0][0].path, room.default, stop)
        next(items)
        stop.set()
        with pytest.raises(Stopped) as stopped:
            list(items)
        reading = stopped.value.reading
        assert 0 < reading.seconds < 32 and reading.num_tokens < room.plan(examples[0][0].path, room.default).tokens
        assert finish(room.ask(here(reading), room.default, "How many stars are there?", 4, threading.Event()))[0].text

    def test_whoever_goes_away_stops_the_work(self, room, examples):
        stop = threading.Event()
        items = room.read(examples[0][0].path, room.default, stop)
        next(items)
        items.close()
        assert stop.is_set()
        with room.line.turn(threading.Event(), lambda _: None):  # comes, once the work has ended
            pass

    def test_an_answer_can_be_stopped(self, room, examples):
        reading, _ = finish(room.read(examples[0][0].path, room.default, threading.Event()))
        stop = threading.Event()
        items = room.ask(here(reading), room.default, "How many stars are there?", 16, stop)
        stop.set()
        with contextlib.suppress(Stopped):
            answer, _ = finish(items)
            assert len(answer.token_ids) <= 2
        assert finish(room.ask(here(reading), room.default, "How many stars are there?", 16, threading.Event()))[0].text


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def kept(label: str, size: int) -> KeptReading:
    return KeptReading(SimpleNamespace(), Settings(2.0, 4, "sparse", 2), label, size, 1.0)


class TestVisitors:
    @pytest.fixture
    def clock(self):
        return Clock()

    @pytest.fixture
    def visitors(self, tmp_path, clock):
        limits = Limits(
            upload_bytes=100, all_upload_bytes=250, visitors=3, readings=2, all_reading_bytes=100, idle_seconds=60.0
        )
        return Visitors(tmp_path, limits, clock)

    def test_leaving_removes_everything(self, visitors):
        visitor = visitors.arrive("a")
        (visitor.folder / "film.mp4").write_bytes(b"film")
        visitors.keep(visitor, kept("Sparse", 10))
        visitors.leave("a")
        assert not visitor.folder.exists() and not visitor.readings and visitor.stop.is_set()
        assert visitors.by_key(visitor.key) is None and visitors.reading_bytes == 0
        with pytest.raises(Refused, match="reload"):
            visitors.of("a")
        with pytest.raises(Refused):
            visitors.keep(visitor, kept("Sparse", 10))
        visitors.leave("a")  # twice is no error

    def test_idle_visitors_are_forgotten(self, visitors, clock):
        idle, active = visitors.arrive("idle"), visitors.arrive("active")
        clock.now = 50
        assert visitors.of("active") is active
        clock.now = 61
        visitors.sweep()
        assert not idle.folder.exists() and visitors.of("active") is active

    def test_who_waits_in_line_is_not_idle(self, visitors, clock):
        waiting = visitors.arrive("waiting")
        clock.now = 61
        with waiting.busy:
            visitors.sweep()
        assert waiting.folder.exists() and not waiting.is_gone
        visitors.sweep()
        assert waiting.is_gone

    def test_room_is_made_before_a_reading(self, visitors, clock):
        early, late = visitors.arrive("early"), visitors.arrive("late")
        mine = [kept("one", 60), kept("two", 30)]
        for one in mine:
            visitors.keep(early, one)
        clock.now = 1
        visitors.touch(late)
        visitors.make_room(70)
        assert visitors.reading_bytes == 30 and mine[0].reading is None and early.readings == mine[1:]
        visitors.make_room(100)
        assert visitors.reading_bytes == 0 and mine[1].reading is None

    def test_arriving_again_is_another_visitor(self, visitors):
        first = visitors.arrive("a")
        second = visitors.arrive("a")
        assert first.is_gone and first.key != second.key and len(visitors) == 1

    def test_oldest_readings_go(self, visitors, clock):
        early, late = visitors.arrive("early"), visitors.arrive("late")
        visitors.keep(early, kept("one", 30))
        visitors.keep(early, kept("two", 30))
        visitors.keep(early, kept("three", 30))
        assert [one.label for one in early.readings] == ["two", "three"]
        visitors.keep(early, kept("two", 30))  # takes the place of the one before
        assert [one.label for one in early.readings] == ["three", "two"]
        clock.now = 1
        visitors.touch(late)
        visitors.keep(late, kept("one", 60))
        assert [one.label for one in early.readings] == ["two"] and len(late.readings) == 1
        visitors.keep(late, kept("two", 100))
        assert not early.readings and [one.label for one in late.readings] == ["two"]
        with pytest.raises(Refused, match="more memory"):
            visitors.keep(late, kept("three", 101))

    def test_choosing_drops_what_belongs_to_another_video(self, visitors, tmp_path):
        visitor = visitors.arrive("a")
        films = [Video(visitor.folder / f"{name}.mp4", name, is_upload=True) for name in "ab"]
        for film in films:
            film.path.write_bytes(b"film")
            visitor.upload = film
            visitors.choose(visitor, film)
        visitors.keep(visitor, kept("Sparse", 10))
        visitor.messages.append({"role": "user", "content": "?"})
        assert not films[0].path.exists() and films[1].path.exists()
        example = Video(tmp_path / "example.mp4", "example")
        example.path.write_bytes(b"film")
        visitors.choose(visitor, example)
        assert not visitor.readings and not visitor.messages and example.path.exists()

    def test_room_for_uploads(self, visitors):
        for name in "ab":
            (visitors.arrive(name).folder / "film.mp4").write_bytes(bytes(90))
        with pytest.raises(Refused, match="no room"):
            visitors.reserve_upload(visitors.arrive("c"))
        with pytest.raises(Refused, match="no room"):
            visitors.reserve_upload(visitors.of("a"))  # its own file counts too
        visitors.leave("b")
        assert visitors.reserve_upload(visitors.of("a")) == 100
        assert visitors.reserve_upload(visitors.of("a")) == 100  # the place of the same new file
        with pytest.raises(Refused, match="no room"):
            visitors.reserve_upload(visitors.of("c"))  # the other's may become as large
        visitors.of("a").reserved = 0
        assert visitors.reserve_upload(visitors.of("c")) == 100

    def test_files_that_go_while_they_are_counted(self, visitors):
        visitor = visitors.arrive("a")
        (visitor.folder / "gone.mp4").symlink_to(visitor.folder / "nothing")  # listed, and not there when looked at
        (visitor.folder / "running.part").write_bytes(bytes(200))  # of the room that is reserved
        assert visitors.reserve_upload(visitor) == 100
        shutil.rmtree(visitor.folder)
        assert visitors.reserve_upload(visitor) == 100

    def test_keys_with_any_letters(self, visitors):
        visitor = visitors.arrive("a")
        for key in ("\u00e9", visitor.key + "\u00e9", "\udcff", ""):
            assert visitors.by_key(key) is None
        assert visitors.by_key(visitor.key) is visitor

    def test_full(self, visitors):
        for number in range(3):
            visitors.arrive(str(number))
        visitors.arrive("0")
        with pytest.raises(Refused, match="Too many visitors"):
            visitors.arrive("3")


class TestJobs:
    @pytest.fixture
    def jobs(self, room, tmp_path):
        return Jobs(room, Visitors(tmp_path, Limits(seconds=40.0, question_letters=50, new_tokens=64)))

    @pytest.fixture
    def visitor(self, jobs, examples):
        visitor = jobs.visitors.arrive("a")
        jobs.visitors.choose(visitor, examples[0][0])
        return visitor

    def test_asking_reads_first_and_again_where_the_reading_was_dropped(self, jobs, visitor, room):
        updates = list(jobs.ask(visitor, room.default, "How many stars are there?", [], 16))
        assert sum("is_reading" in update for update in updates) == 1
        assert updates[-1]["evidence"].count("<img") == views.FRAMES
        visitor.readings.clear()
        updates = list(jobs.ask(visitor, room.default, "How many stars are there?", ["Sparse, 2 blocks"], 16))
        assert "dropped to make room" in updates[1]["status"] and len(visitor.messages) == 4

    def test_side_by_side(self, jobs, visitor, room):
        dense = Settings(2.0, 4, "dense", 2)
        for settings in (room.default, dense):
            list(jobs.read(visitor, settings))
        updates = list(jobs.ask(visitor, room.default, "How many stars are there?", [], 16))
        assert [message["content"].rpartition(" ")[0] for message in visitor.messages[1:]] == [
            "**Sparse, 2 blocks:**",
            "**Dense:**",
        ]
        table = views.comparison(next(update["readings"] for update in updates[::-1] if "readings" in update))
        assert "100%" in table and "43%" in table
        list(jobs.ask(visitor, room.default, "How many stars are there?", ["Dense"], 16))
        assert len(visitor.messages) == 5  # one answer

    def test_one_thing_at_a_time(self, jobs, visitor, room):
        running = jobs.read(visitor, room.default)
        next(running)
        with pytest.raises(Refused, match="One thing at a time"):
            next(jobs.read(visitor, room.default))
        assert list(running) and visitor.readings
        assert list(jobs.read(visitor, room.default))

    def test_one_waits_for_what_is_stopped_and_can_be_stopped_too(self, jobs, visitor, room):
        """Each that waits holds a thread of the server, and whoever leaves meanwhile is not served any more."""
        running = jobs.read(visitor, room.default)
        next(running)
        visitor.stop.set()
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(list, jobs.read(visitor, room.default))
            deadline = time.monotonic() + SECONDS
            while visitor.stop.is_set() and time.monotonic() < deadline:  # until it has one of its own
                time.sleep(0.01)
            with pytest.raises(Refused, match="One thing at a time"):
                list(jobs.read(visitor, room.default))
            jobs.visitors.leave("a")
            running.close()
            assert not any("is_reading" in update for update in waiting.result(SECONDS))
        assert not visitor.readings

    def test_room_is_made_when_the_turn_has_come(self, jobs, visitor, room, examples):
        """What is kept, and what somebody waits to ask, is dropped before the next video is read, not after."""
        list(jobs.read(visitor, room.default))
        size = jobs.visitors.reading_bytes
        (kept,) = visitor.readings
        tight = Jobs(room, Visitors(jobs.visitors.folder, Limits(all_reading_bytes=int(1.2 * size))))
        first, second = (tight.visitors.arrive(name) for name in "ab")
        for one in first, second:
            tight.visitors.choose(one, examples[0][0])
        list(tight.read(first, room.default))
        asking = tight.ask(first, room.default, "How many stars are there?", [], 16)
        updates = [next(asking), next(asking)]  # the question is shown, and its turn has not come
        (kept,) = first.readings
        list(tight.read(second, room.default))
        assert kept.reading is None and not first.readings and tight.visitors.reading_bytes == second.readings[0].bytes
        with pytest.raises(Refused, match="dropped to make room"):
            updates.extend(asking)
        assert not first.messages  # the question can be asked again

    def test_huge_pictures_are_refused_before_one_is_decoded(self, jobs, room, tmp_path, monkeypatch):
        path = tmp_path / "small.gif"
        pictures = [Image.new("P", (5000, 3000), color) for color in (0, 1)]
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=500)
        monkeypatch.setattr(room, "plan", None)
        with pytest.raises(Refused, match="5,000 x 3,000 pixels"):
            jobs.plan(Video(path, "small.gif"), room.default)

    def test_choosing_another_video_stops_and_shows_nothing_of_the_first(self, jobs, visitor, room, examples):
        running = jobs.ask(visitor, room.default, "How many stars are there?", [], 16)
        next(running)
        jobs.visitors.choose(visitor, examples[1][0])
        assert not any(update.keys() & {"readings", "evidence"} for update in running)
        assert not visitor.readings and not visitor.messages

    def test_limits(self, jobs, visitor, room, tmp_path):
        for question, length in (("", 8), ("x" * 51, 8), ("x", 65), ("x", 0), ("x", "8")):
            with pytest.raises(Refused):
                list(jobs.ask(visitor, room.default, question, [], length))
        path = write_video(tmp_path / "long.mp4", [np.zeros((56, 56, 3), np.uint8)] * 82, fps=2)
        with pytest.raises(Refused, match="0:41 long, and the limit here is 0:40"):
            jobs.plan(Video(path, "long"), room.default)
        small = Jobs(room, Visitors(tmp_path, Limits(all_reading_bytes=1000)))
        with pytest.raises(Refused, match="Its cache would take"):
            small.plan(visitor.video, room.default)

    @pytest.mark.parametrize(
        "values",
        [(0, 4, "sparse", 2), (2, "4", "sparse", 2), (2, 4, "both", 2), (2, 4, "sparse", float("nan"))],
        ids=str,
    )
    def test_settings_that_no_slider_gives(self, jobs, values):
        with pytest.raises(Refused):
            jobs.settings(*values)

    def test_errors_tell_no_paths(self, jobs, room, tmp_path):
        path = tmp_path / "secret-place.mp4"
        path.write_bytes(b"\0\0\0\x18ftypisom" + bytes(1000))
        with pytest.raises(Refused) as refused:
            jobs.plan(Video(path, "my film.mp4"), room.default)
        assert "my film.mp4" in str(refused.value) and str(tmp_path) not in str(refused.value)
        assert for_visitors(ValueError(f"{tmp_path}/other is broken"), Video(path, "x")) == WENT_WRONG


class TestFiles:
    @pytest.mark.parametrize(
        "suffix", ["mp4", "mov", "mkv", "webm", "avi", "ts", "m2ts", "mpg", "flv", "ogv", "wmv", "gif"]
    )
    def test_containers_are_known_by_their_beginning(self, suffix, tmp_path):
        codecs = {"webm": "libvpx", "ogv": "libtheora", "wmv": "wmv2", "mpg": "mpeg1video", "flv": "flv"}
        codec, path = codecs.get(suffix, "mpeg4"), tmp_path / f"a.{suffix}"
        pictures = [np.full((64, 64, 3), 10 * number, np.uint8) for number in range(12)]
        if suffix == "gif":
            first, *others = map(Image.fromarray, pictures)
            first.save(path, save_all=True, append_images=others)
        elif codec in av.codecs_available:
            write_video(path, pictures, fps=25, codec=codec)
        else:
            pytest.skip(f"this PyAV has no {codec}")
        found = container_suffix(path.read_bytes()[:512])
        assert found == ("." + suffix).replace(".mov", ".mp4")
        # FFmpeg agrees, and with no other kind; to what is broken the reader says no.
        assert is_what_it_seems(path.rename(tmp_path / f"b{found}"))
        others = {".mp4", ".avi", ".gif"} - {found}
        for other in others:
            assert not is_what_it_seems(Path(shutil.copy(tmp_path / f"b{found}", tmp_path / f"c{other}"))), other
        (tmp_path / f"d{found}").write_bytes(bytes(100))
        assert is_what_it_seems(tmp_path / f"d{found}")

    def test_large_boxes(self):
        assert container_suffix(b"\0\0\0\1mdat" + bytes(8)) == ".mp4"  # its size follows
        assert container_suffix(b"\x20\0\0\0mdat") == ".mp4"

    @pytest.mark.parametrize(
        "content",
        [
            b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/passwd\n#EXT-X-ENDLIST\n",
            b"ffconcat version 1.0\nfile /etc/passwd\n",
            b"<?xml version='1.0'?><MPD></MPD>",
            b"[playlist]\nFile1=/etc/passwd\n",
            b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\n",
            b"GIF",
            b"RIFF\0\0\0\0WAVE",
            b"",
            b"<!--skip-->\n<MPD xmlns='urn:mpeg:dash:schema:mpd:2011'></MPD>",
            b"#wd\nfree text",
            b"\xff\xff\xff\xffskip",
            b"\0\0\0\7free",
        ],
        ids=repr,
    )
    def test_playlists_and_texts_are_none(self, content):
        assert container_suffix(content) is None

    def test_names(self):
        assert shown_name("../../etc/passwd") == "passwd"
        assert shown_name("C:\\films\\a.mp4") == "a.mp4"
        assert shown_name("a\nb\x1b[31m.mp4") == "ab[31m.mp4"
        assert len(shown_name("x" * 500 + ".mp4")) <= 80

    def test_html_is_escaped(self):
        name = "<img src=x onerror=alert(1)>${alert(1)}{{x}}`"
        shown = views.player(Video(ROOT, name), "key", 1) + views.chips([name]) + views.problem(name)
        assert "<img src=x" not in shown and "${" not in shown and "{{" not in shown and "`" not in shown


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    arguments = ("--max-upload-mb", "1", "--max-minutes", "1", "--chunk-tokens", str(CHUNK))
    server = PageServer(tmp_path_factory.mktemp("page"), *arguments)
    yield server
    server.stop()
    assert server.process.returncode == 0 and not list(server.temporary.glob("videonsa-page-*"))
    assert not [path for path in server.temporary.rglob("*") if path.is_file()]


@pytest.fixture
def client(server):
    client = PageClient(server.url)
    yield client
    client.leave()


@pytest.fixture
def other(server):
    client = PageClient(server.url)
    yield client
    client.leave()


class TestServer:
    """A client that is no browser, and means no good."""

    def test_upload_read_ask(self, client, examples):
        video, questions = examples[1]
        assert client.upload(video.path.read_bytes(), "Holiday <1>.mp4") == (200, {"name": "Holiday <1>.mp4"})
        shown = client.call("on_upload")
        assert "Holiday &lt;1&gt;.mp4" in shown["player"] and "64" in shown["plan"] and not shown["chips"]
        status, body = request(f"{client.url}/visitor/{client.key}/video", Range="bytes=4-7")
        assert (status, body) == (206, b"ftyp")
        client.call("on_read")
        assert "Read in" in client.parts["status"]
        for question in questions[:2]:
            assert parse_answer(client.ask(question.text), question.choices) == question.answer
        assert len(client.parts["chat"]) == 4

    def test_two_visitors_at_once(self, client, other, examples):
        asked = list(zip((client, other), examples[:2], strict=True))

        def visit(one, example):
            video, questions = example
            assert one.upload(video.path.read_bytes(), f"{video.name}.mp4")[0] == 200
            one.call("on_upload")
            return [parse_answer(one.ask(question.text), question.choices) == question.answer for question in questions]

        with ThreadPoolExecutor(2) as pool:
            results = [pool.submit(visit, *one) for one in asked]
        assert all(all(result.result()) for result in results)
        for one, (_, questions) in asked:
            texts = [message["content"] for message in one.parts["chat"] if message["role"] == "user"]
            said = [text if isinstance(text, str) else text[0]["text"] for text in texts]
            assert said == [question.text for question in questions]

    def test_nobody_gets_the_files_of_another(self, client, other, server, examples):
        client.upload(examples[0][0].path.read_bytes(), "secret.mp4")
        client.call("on_upload")
        (path,) = [file for folder in server.visitor_folders for file in folder.glob("*.mp4")]
        # By its path, in every input that there is, as Gradio's clients name files.
        for named in (str(path), "/etc/passwd", "http://127.0.0.1:9/film.mp4", f"file://{path}"):
            file = {"path": named, "meta": {"_type": "gradio.FileData"}}
            for function in ("on_upload", "on_settings", "on_ask"):
                count = len(other.functions[function]["inputs"])
                assert other.join(function, [file] * count)[0] == 400
            assert "did not arrive" in other.call("on_upload")["status"]
        body = json.dumps({"data": [file], "fn_index": 1, "session_hash": other.session})
        escaped = body.replace("gradio.FileData", "gradio.File\\u0044ata")
        for text in (body, escaped, escaped.encode("utf-16").decode("latin-1"), "no JSON"):
            assert request(f"{server.url}/gradio_api/queue/join", text.encode(), "POST")[0] == 400
            assert request(f"{server.url}/gradio_api/run/predict", text.encode(), "POST")[0] == 400
        for chosen in ({"index": str(path)}, {"index": -1}, {"index": 99}, [str(path)], None):
            assert "no such" in other.call("on_example", event_data=chosen)["status"], chosen
        # By its address, without the secret, and past the routes.
        assert request(f"{server.url}/visitor/{other.key}x/video")[0] == 404
        assert b"secret" not in request(f"{server.url}/visitor/{other.key}/video")[1]
        for place in (f"file={path}", "file=/etc/passwd", "file=http://127.0.0.1:9/", "proxy=http://127.0.0.1:9/"):
            assert request(f"{server.url}/gradio_api/{place}")[0] == 404
            assert request(f"{server.url}/{place}")[0] == 404
        assert request(f"{server.url}/gradio_api/upload", b"x", "POST")[0] == 404
        direct = json.dumps({"data": [None] * 4, "fn_index": other.functions["on_upload"]["id"]}).encode()
        for place in ("run/on_upload", "run/predict"):
            status, _ = request(
                f"{server.url}/gradio_api/{place}", direct, "POST", **{"Content-Type": "application/json"}
            )
            assert status == 404  # handlers that wait in the queue cannot be called past it
        assert request(f"{server.url}/gradio_api/call/on_upload", b"{}", "POST")[0] == 404
        for place in ("..%2f..%2fetc%2fpasswd", "../../etc/passwd", f"{client.key}/../{client.key}/video/x"):
            assert request(f"{server.url}/visitor/{place}")[0] == 404
        assert other.upload(b"x", key="nobody")[0] == 410

    @pytest.mark.parametrize(
        ("content", "status", "said"),
        [
            (b"", 415, "is empty"),
            (b"a text", 415, "not a video file"),
            (b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/passwd\n#EXT-X-ENDLIST\n", 415, "not a video file"),
            (b"\0\0\0\x18ftypisom" + bytes(1 << 20), 413, "larger than 1 MB"),
            (bytes(100 << 20), 413, "larger than 1 MB"),
        ],
        ids=["empty", "text", "playlist", "large", "very large"],
    )
    def test_what_is_no_video_is_not_kept(self, client, server, content, status, said):
        answer = client.upload(content, "film.mp4")
        assert answer[0] == status and said in answer[1]["error"] and "film.mp4" in answer[1]["error"]
        assert not [file for folder in server.visitor_folders for file in folder.iterdir() if folder.name == client.key]

    def test_everything_else_is_closed(self, server):
        """Every address that this version of Gradio has, and that the page does without."""
        with gr.Blocks() as blocks:
            gr.HTML("")
        known = all_routes(gr.routes.App.create_app(blocks))
        open_ones = {"/", "/config", "/theme.css", "/favicon.ico", "/manifest.json"}
        open_ones |= {"/static/{path:path}", "/assets/{path:path}", "/svelte/{path:path}"}
        names = ["app_id", "startup-events", "theme.css", "heartbeat/{session_hash}", "queue/data", "queue/join"]
        open_ones |= {f"/gradio_api/{name}" for name in [*names, "cancel", "reset"]}
        closed = {route.path for route in known if route.path.removesuffix("/") not in open_ones} - {"/"}
        assert {"/gradio_api/process_recording", "/gradio_api/upload", "/gradio_api/runs", "/openapi.json"} <= closed
        closed |= {"/gradio_api/run/on_stop", "/gradio_api/heartbeat/a/b", "/visitor/a", "/x", "//config"}
        for path in sorted(closed):
            address = server.url + re.sub(r"\{[^}]*\}", "x", path)
            for method, body in (("GET", None), ("POST", b"{}"), ("HEAD", None)):
                assert request(address, body, method)[0] == 404, (method, path)
        assert request(f"{server.url}/config", b"{}", "POST")[0] == 404

    def test_stopping_is_open(self, client):
        """As the browser asks for it: by its number, past the queue."""
        stop = json.dumps({"data": [], "fn_index": client.functions["on_stop"]["id"], "session_hash": client.session})
        kind = {"Content-Type": "application/json"}
        assert request(f"{client.url}/gradio_api/run/predict", stop.encode(), "POST", **kind)[0] == 200

    def test_a_recording_is_not_processed(self, server):
        body = b"--x\r\nContent-Disposition: form-data; name=video; filename=a\r\n\r\n#EXTM3U\r\n--x--\r\n"
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        assert request(f"{server.url}/gradio_api/process_recording", body, "POST", **kind)[0] == 404

    def test_nothing_is_recorded(self, server):
        assert json.loads(request(f"{server.url}/config")[1])["run_history"] is False

    def test_keys_of_other_letters(self, server):
        for key in ("%C3%A9", "%FF", "%00"):
            assert request(f"{server.url}/visitor/{key}/video")[0] == 404

    def test_a_visitor_has_one_upload_at_a_time(self, client, server, examples):
        """Each promises a byte more than it sends; all but the last are ended, and their bytes are gone."""
        (folder,) = server.temporary.glob(f"videonsa-page-*/visitors/{client.key}")
        content = b"\0\0\0\x18ftypisom" + bytes((1 << 18) - 12)
        head = f"PUT /visitor/{client.key}/upload HTTP/1.1\r\nHost: a\r\nContent-Length: {len(content) + 1}\r\n\r\n"

        def stored():
            return sum(file.stat().st_size for file in folder.iterdir())

        def is_stored():
            with contextlib.suppress(FileNotFoundError):  # the one before goes
                return stored() == len(content)

        with contextlib.ExitStack() as stack:
            sockets = []
            for _ in range(6):
                sockets.append(stack.enter_context(socket.create_connection(("127.0.0.1", server.port), SECONDS)))
                sockets[-1].sendall(head.encode() + content)
                if len(sockets) > 1:
                    assert sockets[-2].recv(12) == b"HTTP/1.1 400"
                wait_until(is_stored)
            # A whole one ends the last of them.
            assert client.upload(examples[0][0].path.read_bytes())[0] == 200
            assert sockets[-1].recv(12) == b"HTTP/1.1 400"
            assert [file.suffix for file in folder.iterdir()] == [".mp4"]
            # And leaving ends one that has stalled.
            sockets.append(stack.enter_context(socket.create_connection(("127.0.0.1", server.port), SECONDS)))
            sockets[-1].sendall(head.encode() + content)
            wait_until(lambda: any(file.suffix == ".part" for file in folder.iterdir()))
            client.leave()
            assert sockets[-1].recv(12) == b"HTTP/1.1 400" and not folder.exists()

    def test_a_large_body_without_its_length(self, client, server):
        """Chunks, as of somebody who does not tell how much is to come."""
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
        body = iter([b"\0\0\0\x18ftypisom", *[bytes(1 << 18)] * 100])
        connection.request("PUT", f"/visitor/{client.key}/upload?name=a.mp4", body, encode_chunked=True)
        assert connection.getresponse().status == 413

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("PUT", "/visitor/nobody/upload", 410),
            ("POST", "/gradio_api/upload", 404),
            ("POST", "/gradio_api/queue/join", 400),
        ],
    )
    def test_large_requests_see_why_they_are_refused(self, server, method, path, status):
        """None is read to its end by what refuses it."""
        assert request(server.url + path, bytes(100 << 20), method)[0] == status

    def test_a_refused_request_that_never_ends(self, server):
        with socket.create_connection(("127.0.0.1", server.port), SECONDS) as connection:
            connection.sendall(b"PUT /visitor/nobody/upload HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n")
            with connection.makefile("rb") as answer:
                assert answer.read().startswith(b"HTTP/1.1 410")  # to its end: the server closes the connection

    def test_broken_and_long_videos(self, client, server, examples, tmp_path):
        whole = examples[0][0].path.read_bytes()
        for name, content in (("cut.mp4", whole[: len(whole) // 2]), ("empty.mp4", whole[:32] + bytes(5000))):
            assert client.upload(content, name)[0] == 200
            shown = client.call("on_upload")["plan"]
            assert 'role="alert"' in shown and name in shown.lower() and "/" not in views_text(shown), shown
            client.call("on_read")
            assert 'role="alert"' in client.parts["status"] and "Traceback" not in client.parts["status"]
        path = write_video(tmp_path / "long.mp4", [np.zeros((56, 56, 3), np.uint8)] * 130, fps=2)
        client.upload(path.read_bytes(), "long.mp4")
        assert "1:05 long, and the limit here is 1:00" in client.call("on_upload")["plan"]

    def test_events_are_not_large(self, client):
        count = len(client.functions["on_ask"]["inputs"])
        assert client.join("on_ask", ["x" * 300_000] + [None] * (count - 1))[0] == 400

    def test_leaving_removes_files(self, client, server, examples):
        client.upload(examples[0][0].path.read_bytes())
        client.call("on_upload")
        folder = next(folder for folder in server.visitor_folders if folder.name == client.key)
        assert list(folder.iterdir())
        client.leave()
        wait_until(lambda: not folder.exists())
        assert "reload" in client.call("on_read")["status"]
        assert client.upload(b"x")[0] == 410


def all_routes(router) -> list:
    """Of a FastAPI application, with those of the routers that it includes, which some versions keep apart."""
    inner = [getattr(route, "original_router", None) for route in router.routes]
    plain = [route for route, router in zip(router.routes, inner, strict=True) if router is None]
    return sum((all_routes(router) for router in inner if router is not None), plain)


def wait_until(condition) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.02)


def test_a_stalled_upload_ends(tmp_path, monkeypatch):
    """Nothing comes any more of what its sender wants on."""
    monkeypatch.setattr(page.routes, "CHUNK_SECONDS", 0.3)
    visitors = Visitors(tmp_path, Limits())
    visitor = visitors.arrive("a")
    messages = iter([{"type": "http.request", "body": b"\0\0\0\x18ftypisom", "more_body": True}])
    sent = []

    async def receive():
        return next(messages, None) or await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "PUT",
        "path": f"/visitor/{visitor.key}/upload",
        "query_string": b"",
        "headers": [],
    }
    upload = page.routes.routes(visitors)[0]
    asyncio.run(upload.handle(scope | {"path_params": {"key": visitor.key}}, receive, send))
    assert sent[0]["status"] == 408 and not list(visitor.folder.iterdir()) and visitor.reserved == 0


def views_text(shown: str) -> str:
    return shown.split("<p>")[1].split("</p>")[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-minutes", "0"],
        ["--examples", "-1"],
        ["--share", "maybe"],
        ["--max-upload-mb", "inf"],
        ["--max-readings-gb", "nan"],
        ["--port", "99999999"],
        ["--port", "-1"],
    ],
    ids=str,
)
def test_wrong_arguments_are_told_before_anything_is_loaded(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["app.py", *arguments])
    with pytest.raises(SystemExit):
        app.main()
    assert arguments[0] in capsys.readouterr().err


def test_large_uploads_have_room(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["app.py", "--max-upload-mb", "5120"])
    visitors = Visitors(tmp_path, app.limits_of(app.parse_arguments()))
    assert visitors.reserve_upload(visitors.arrive("a")) == 5120 << 20


def test_only_checkpoints_of_this_model(tmp_path):
    app.check_checkpoint(str(TINY))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    with pytest.raises(ValueError, match=r"--model .* videonsa, got .* 'qwen2_5_vl'"):
        app.check_checkpoint(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="None"):
        app.check_checkpoint(str(tmp_path))
    with pytest.raises(OSError, match="nothing-here"):
        app.check_checkpoint(str(tmp_path / "nothing-here"))


def test_gradio_keeps_its_files_in_the_folder_of_the_page():
    """It reads where to at its import, so that this asks a process of its own."""
    code = "import app, gradio.routes, os; print(gradio.routes.DEFAULT_TEMP_DIR, app.FOLDER.name, sep=os.linesep)"
    environment = os.environ | {"GRADIO_TEMP_DIR": "/elsewhere"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    gradios, folder = map(Path, done.stdout.split())
    assert folder in gradios.parents and not folder.exists()
