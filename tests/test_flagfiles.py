"""Flagfiles: what stands in the place of one, and which are refused."""

import os
import threading

import pytest
from absl import flags

from snn_tf.errors import UsageError
from snn_tf.flagfiles import expanded


def write(path, text):
    path.write_text(text)
    return f"--flagfile={path}"


def refusal(*words) -> str:
    """The single line with which words are refused."""
    with pytest.raises(UsageError) as caught:
        expanded(words)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    return str(caught.value)


def test_words_of_flagfiles_stand_where_the_flagfile_stood(tmp_path):
    inner = write(tmp_path / "inner.flags", "--seed=2\n# a comment\n// another\n\n  --width=0.5  \n")
    outer = write(tmp_path / "outer.flags", f"--seed=1\n{inner}\n--seed=3")
    assert expanded(["--a", outer, "--b"]) == [
        "--a",
        "--seed=1",
        "--seed=2",
        "--width=0.5",
        "--seed=3",
        "--b",
    ]


def test_flagfile_may_be_two_words_and_have_one_dash(tmp_path):
    path = write(tmp_path / "x.flags", "--seed=1").partition("=")[2]
    assert expanded(["--flagfile", path, "-flagfile", path, f"-flagfile={path}"]) == ["--seed=1"] * 3


def test_flagfiles_are_read_as_absl_reads_them(tmp_path):
    inner = write(tmp_path / "inner.flags", "--seed=2\n\n#--seed=5\n//x\n--run_dir=a b\n")
    words = [write(tmp_path / "outer.flags", f"--seed=1\n{inner}\n--width\n0.5\n"), "--seed=4"]
    assert expanded(words) == flags.FlagValues().read_flags_from_files(words)


def test_flagfile_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "x.flags", "--seed=1")
    assert expanded(["--flagfile=~/x.flags"]) == ["--seed=1"]


def test_flagfile_of_another_editor_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "x.flags").write_bytes(b"\xef\xbb\xbf--seed=1\r\n--width=0.5\r\n")
    assert expanded([f"--flagfile={tmp_path}/x.flags"]) == ["--seed=1", "--width=0.5"]


def test_flagfile_from_a_pipe_is_read_once(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("--seed=1\n",))
    writer.start()
    assert expanded([f"--flagfile={pipe}"]) == ["--seed=1"]
    writer.join()


def test_same_flagfile_twice_is_no_circle(tmp_path):
    word = write(tmp_path / "x.flags", "--seed=1")
    both = write(tmp_path / "both.flags", f"{word}\n{word}\n")
    assert expanded([both]) == ["--seed=1"] * 2


def test_flagfile_that_includes_itself_is_refused(tmp_path):
    path = tmp_path / "self.flags"
    write(path, f"--seed=1\n--flagfile={path}\n")
    assert refusal(f"--flagfile={path}") == (
        f"--flagfile={path}: must not include itself ({path} → {path})"
    )


def test_flagfiles_that_include_each_other_are_refused_with_the_way(tmp_path):
    one, two, three = (tmp_path / f"{name}.flags" for name in ("one", "two", "three"))
    write(one, f"--flagfile={two}")
    write(two, f"--flagfile={three}")
    write(three, f"--flagfile\n{two}\n")
    assert refusal("--flagfile", str(one)) == (
        f"--flagfile={two}: must not include itself ({two} → {three} → {two})"
    )


@pytest.mark.parametrize("word", ["--flagfile", "--flagfile=", "-flagfile="])
def test_flagfile_without_a_name_is_refused(word):
    assert refusal("--seed=1", word).startswith("--flagfile=: must name a file, such as")


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda path: None, "cannot be read (No such file or directory)"),
        (lambda path: path.mkdir(), "cannot be read (Is a directory)"),
        (lambda path: path.write_bytes(b"--seed=1\n\xff"), "must be a text file in UTF-8"),
        (lambda path: path.write_text("#" * (2**20 + 1)), "must be at most 1048576 characters long"),
    ],
    ids=["missing", "folder", "not text", "endless"],
)
def test_flagfile_that_is_none_is_named(tmp_path, make, said):
    make(tmp_path / "x")
    assert refusal(f"--flagfile={tmp_path}/x") == f"--flagfile={tmp_path}/x: {said}"


def test_flagfile_nested_too_deep_is_refused(tmp_path):
    for number in range(20):
        write(tmp_path / f"{number}", f"--flagfile={tmp_path}/{number + 1}")
    assert refusal(f"--flagfile={tmp_path}/0") == (
        f"--flagfile={tmp_path}/16: must be nested at most 16 deep"
    )
