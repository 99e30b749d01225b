"""`quip generate`: text alone on standard output, and conversations on a terminal."""

import io
import json
import os
import re
import select
import subprocess
import sys

import pytest

from tests.support.checkpoints import ROOT, fresh, quantized, save
from tests.support.runs import save_model
from tests.support.speaking import TEMPLATE, byte_level, save_speaker

pytestmark = pytest.mark.usefixtures("command")

ANSWER = ">Hé, 日😀!"  # what the speakers go on with, after their template's last character


@pytest.fixture(scope="module")
def speaker(tmp_path_factory) -> str:
    return save_speaker(tmp_path_factory.mktemp("models") / "speaker", ANSWER)


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "endless"
    return save_speaker(folder, ">abc", loop=True, positions=1_000_000)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    return save_speaker(tmp_path_factory.mktemp("models") / "plain", "xyz!", template=None)


@pytest.fixture
def standard_input(monkeypatch):
    """standard_input(bytes) is what is piped in."""

    def pipe(content: bytes, errors: str = "strict") -> None:
        stream = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", errors=errors)
        monkeypatch.setattr("sys.stdin", stream)

    return pipe


@pytest.fixture
def terminal(monkeypatch):
    """terminal(*lines): what is typed; an exception is a key that raises it."""

    def type_(*lines: str | type[BaseException]) -> None:
        typed = iter(lines)

        def answer(prompt: str = "") -> str:
            line = next(typed)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr("builtins.input", answer)

    return type_


def seen(line: str) -> int:
    """The prompt's tokens, of the line about an answer."""
    return int(re.match(r"quip: prompt (\d+) tokens in [\d.]+ s \([\d.]+ a second\)", line)[1])


def written(*messages: tuple[str, str]) -> int:
    """How many tokens a conversation takes, a token a byte (but for `an`)."""
    talk = [{"role": role, "content": content} for role, content in messages]
    tokenizer = byte_level(TEMPLATE)
    return len(tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"])


def test_an_answer_is_all_that_standard_output_gets(quip, speaker):
    status, out, err = quip("generate", speaker, "Hello")
    assert (status, out) == (0, ANSWER[1:] + "\n")
    assert len(err) == 1
    assert re.fullmatch(
        r"quip: prompt 23 tokens in \S+ s \(\S+ a second\); "
        r"then 13 tokens in \S+ s \(\S+ a second\)",
        err[0],
    )
    assert seen(err[0]) == written(("user", "Hello"))


def test_a_system_message_is_one_of_the_template(quip, speaker):
    status, out, err = quip("generate", speaker, "Hello", "--system", "Be kind.")
    assert (status, out) == (0, ANSWER[1:] + "\n")
    assert seen(err[0]) == written(("system", "Be kind."), ("user", "Hello"))


def test_a_text_goes_on_without_a_template_or_where_it_is_not_wanted(quip, speaker, plain):
    assert quip("generate", plain, "wx")[:2] == (0, "yz!\n")
    status, out, err = quip("generate", speaker, "so >", "--no_chat")
    assert (status, out) == (0, ANSWER[1:] + "\n")
    assert seen(err[0]) == 4


def test_an_answer_is_written_whole_and_replaced_when_asked(quip, plain, tmp_path):
    file = tmp_path / "answer.json"
    assert quip("generate", plain, "wx", "--out", file)[:2] == (0, "yz!\n")
    words = json.loads(file.read_text())
    assert (words["model"], words["prompt"], words["text"]) == (plain, "wx", "yz!")
    assert (words["ended"], words["prompt_tokens"], words["new_tokens"]) == ("stop", 2, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answer.json"]
    status, _, err = quip("generate", plain, "wx", "--out", file)
    assert status == 2
    assert err == [f"quip: --out {file}: it exists; name another file or add --overwrite"]
    assert quip("generate", plain, "w", "--out", file, "--overwrite")[0] == 0
    assert json.loads(file.read_text())["prompt"] == "w"


def test_flags_may_stand_anywhere(quip, plain):
    for words in (
        ("--no_chat", plain, "wx"),
        (plain, "--no_chat", "wx"),
        (plain, "--device", "cpu", "wx", "--no_chat"),
    ):
        assert quip("generate", *words)[:2] == (0, "yz!\n")
    for words in ((plain, "--zork"), (plain, "--no_chat", "wx", "yz"), (plain, "wx", "yz")):
        status, _, err = quip("generate", *words)
        assert status == 2
        assert "unrecognized arguments: " in err[0]


def test_a_limit_is_said_whichever_it_was(quip, tmp_path, speaker):
    _, out, err = quip("generate", speaker, "Hello", "--max_new_tokens", 3)
    assert out == "Hé\n"
    assert err[0].endswith("; stopped at --max_new_tokens 3")
    endless = save_speaker(tmp_path, "ab", template=None, loop=True, positions=9)
    _, out, err = quip("generate", endless, "aaaaa")
    assert out == "babab\n"
    assert err[0].endswith("; stopped at the model's last position")


def test_the_prompt_may_come_from_a_pipe(quip, plain, standard_input):
    for words in ([], ["-"]):
        standard_input(b"zz\nyx\n")
        status, out, err = quip("generate", plain, *words)
        assert (status, out) == (0, "yz!\n")
        assert seen(err[0]) == 5  # the last end of line ended the line


def test_drawing_takes_a_seed(quip, tmp_path):
    model = save_model(tmp_path / "opt")

    def text(*flags: object) -> str:
        return quip("generate", model, "some letters", "--max_new_tokens", 20, *flags)[1]

    hot = ("--temperature", 5.0)
    assert text(*hot, "--seed", 1) == text(*hot, "--seed", 1)
    assert text(*hot) == text(*hot, "--seed", 0) != text(*hot, "--seed", 1)
    assert text(*hot, "--top_k", 1) == text() == text(*hot, "--top_p", 1e-9)


def test_packed_checkpoints_and_the_demo_speak(quip, tmp_path):
    folder = save(quantized(), tmp_path / "packed")
    for model in (folder, "demo"):
        status, out, err = quip("generate", model, "a text", "--max_new_tokens", 4)
        assert (status, len(err)) == (0, 1)
        assert out.endswith("\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "--max_new_tokens", "0"], "--max_new_tokens 0: at least 1 is needed"),
        (["x", "--temperature", "-1"], "--temperature -1.0: 0 (the likeliest token"),
        (["x", "--temperature", "nan"], "--temperature nan"),
        (["x", "--temperature", "1", "--top_k", "0"], "--top_k 0: at least 1 is needed"),
        (["x", "--temperature", "1", "--top_p", "2"], "--top_p 2.0: above 0 and at most 1"),
        (["x", "--top_p", "0.9"], "--top_p 0.9 speaks of drawing at random: add a temperature"),
        (["x", "--seed", "3"], "--seed 3 speaks of drawing at random: add a temperature"),
        (["x", "--overwrite"], "--overwrite speaks of a file: name it with --out FILE"),
        (["x", "--out", "/no/such/file"], "--out /no/such/file: no file can be written there"),
        (["x", "--out", "/"], "--out /: no file can be written there"),
        (["x", "--no_chat", "--system", "s"], "--system speaks of the chat template, which"),
        ([""], "the prompt is empty: say what to answer or to continue"),
        ([" \n"], "the prompt is empty"),
        (["-"], "the prompt is empty"),
        ([], "the prompt is empty"),
        (["caf\udce9"], "the prompt is not UTF-8 text: convert it first"),
    ],
)
def test_what_means_nothing_is_refused_before_a_model_is_looked_for(
    quip, standard_input, words, message
):
    standard_input(b"\n")
    status, out, err = quip("generate", "/no/model", *words)
    assert (status, out, len(err)) == (2, "", 1)
    assert err[0].startswith(f"quip: {message}")


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_that_are_no_text_are_refused(quip, standard_input, errors):
    standard_input("café".encode("latin-1"), errors)
    expected = "quip: the prompt is not UTF-8 text: convert it first"
    assert quip("generate", "/no/model") == (2, "", [expected])


def test_what_the_model_cannot_take_is_refused(quip, plain, speaker):
    status, _, err = quip("generate", plain, "x", "--system", "Be kind.")
    assert (status, err) == (2, [f"quip: --system speaks of a chat template, and {plain} has none"])
    status, _, err = quip("generate", speaker, "Hello", "--system", "Speak Swedish")
    assert status == 2
    assert "refuses messages of the roles system, user: no Swedish" in err[0]
    status, _, err = quip("generate", plain, "x" * 300)
    assert status == 2
    assert err == ["quip: the prompt has 300 tokens, above the model's 256 positions; shorten it"]


@pytest.mark.parametrize("key", ["", "  ", EOFError, KeyboardInterrupt])
def test_a_conversation_remembers_and_ends_well(quip, speaker, terminal, key):
    terminal("Hello", "And now?", key)
    status, out, err = quip("generate", speaker, "--system", "Be kind.")
    said = ANSWER[1:]
    assert (status, out) == (0, f"{said}\n{said}\n")
    talk = [("system", "Be kind."), ("user", "Hello")]
    assert seen(err[0]) == written(*talk)
    assert seen(err[1]) == written(*talk, ("assistant", said), ("user", "And now?"))


def test_lines_without_a_template_are_texts_of_their_own(quip, plain, terminal):
    terminal("wx", "y", "")
    status, out, err = quip("generate", plain)
    assert (status, out) == (0, "yz!\nz!\n")
    assert [seen(line) for line in err[:2]] == [2, 1]


def test_a_line_that_is_too_long_ends_no_conversation(quip, speaker, terminal):
    terminal("x" * 300, "Hello", "")
    status, out, err = quip("generate", speaker)
    assert (status, out) == (0, ANSWER[1:] + "\n")
    assert "318 tokens, above the model's 256 positions; say less" in err[0]
    assert seen(err[1]) == written(("user", "Hello"))


def test_an_interrupted_prompt_is_an_interrupted_command(quip, speaker, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("quip.serve.generate.Answer._next", interrupt)
    assert quip("generate", speaker, "Hello") == (130, "\n", ["quip: interrupted"])


ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TERM": "dumb"}
PATIENCE = 120  # seconds, for a process that ought to have spoken


def test_a_reader_may_leave(endless):
    """As `quip generate ... | head -c 5` has it."""
    command = [sys.executable, "-m", "quip", "generate", endless, "x", "--max_new_tokens", "100000"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdout.read(5) == b"abc>a"
        process.stdout.close()
        assert process.wait(PATIENCE) == 0
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


class Typist:
    """Someone at the terminal of a process."""

    def __init__(self, *words: str) -> None:
        self.keys, screen = os.openpty()
        # The first terminal that the leader of a session opens is the one whose Ctrl-C it gets.
        code = (
            "import os, sys; os.close(os.open(os.ttyname(0), os.O_RDWR)); "
            "from quip.cli import main; sys.exit(main())"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *words],
            cwd=ROOT,
            env=ENVIRONMENT,
            start_new_session=True,
            stdin=screen,
            stdout=screen,
            stderr=screen,
        )
        os.close(screen)
        self.read = ""

    def types(self, keys: str) -> None:
        os.write(self.keys, keys.encode())

    def sees(self, text: str) -> None:
        """Wait until the text has come, and take what came until then as read."""
        while text not in self.read:
            more = self._more()
            assert more, f"{text!r} has not come: {self.read[-500:]}"
            self.read += more
        self.read = self.read.split(text, 1)[1]

    def sees_the_end(self) -> int:
        """The status of the process, which waits for its last words to be read."""
        while self._more():
            pass
        return self.process.wait(PATIENCE)

    def _more(self) -> str:
        """What comes next; empty if nothing does."""
        ready, _, _ = select.select([self.keys], [], [], PATIENCE)
        try:
            return os.read(self.keys, 4096).decode(errors="replace") if ready else ""
        except OSError:  # the other side is closed
            return ""

    def leaves(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.keys)


@pytest.mark.skipif(sys.platform == "win32", reason="terminals as Unix has them")
def test_ctrl_c_stops_an_answer_and_ctrl_d_the_conversation(endless):
    typist = Typist("generate", endless, "--max_new_tokens", "900000")
    try:
        typist.sees("> ")
        typist.types("Hello\n")
        typist.sees("abc>abc>")
        typist.types("\x03")
        typist.sees("quip: this answer was stopped")
        typist.sees("> ")
        typist.types("Again\n")
        typist.sees("abc>abc>")
        typist.types("\x03")
        typist.sees("quip: this answer was stopped")
        typist.sees("> ")
        typist.types("\x04")  # a Ctrl-C may come before Python listens, which a person sees
        assert typist.sees_the_end() == 0
    finally:
        typist.leaves()


def test_help_and_refusals_cost_no_model():
    found = fresh(
        "import json, sys; from quip.cli import main; "
        "status = main(['generate', 'demo', '', '--seed', '1']); "
        "print(json.dumps([status, 'torch' in sys.modules]))"
    )
    assert found == [2, False]
