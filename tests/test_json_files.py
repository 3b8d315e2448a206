import pytest

from mapo_jax.errors import UserError
from mapo_jax.json_files import read_json, read_rows


def test_rows_come_with_their_lines(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n\n  \n{"a": "two\u2028lines"}')
    assert list(read_rows(file, "rows")) == [
        (f"{file}, line 1", {"a": 1}),
        (f"{file}, line 4", {"a": "two\u2028lines"}),
    ]


def test_broken_files_are_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    with pytest.raises(UserError, match=r"cannot read the rows .*rows.jsonl: No such file"):
        list(read_rows(file, "rows"))
    file.write_text('{"model": "m"}\n\n{"model": ')
    with pytest.raises(UserError, match=r"rows.jsonl, line 3, is not JSON"):
        list(read_rows(file, "rows"))
    file.write_text("\n")
    with pytest.raises(UserError, match="are empty"):
        list(read_rows(file, "rows"))
    file.write_bytes(b'{"a": 1}\n\xff')
    for read in (read_json, lambda *arguments: list(read_rows(*arguments))):
        with pytest.raises(UserError, match=r"rows.jsonl, line 2: not UTF-8"):
            read(file, "rows")
    file.write_text('{"a": 1,\n "b": }')
    with pytest.raises(UserError, match=r"line 2, is not JSON"):
        read_json(file, "rows")


@pytest.mark.parametrize("text", ["[" * 200_000, "1" * 5000, '{"a": ' + "9" * 5000 + "}"])
def test_what_the_parser_gives_up_on_is_named(tmp_path, text):
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    for read in (read_json, lambda *arguments: list(read_rows(*arguments))):
        with pytest.raises(UserError, match=r"rows.jsonl, line 1, is (not JSON|nested too deeply)"):
            read(file, "rows")


def test_half_characters_are_replaced(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"\\ud83d": ["\\udc00", {"a": "\\ud83d\\ude00"}]}')
    expected = {"\ufffd": ["\ufffd", {"a": "\U0001f600"}]}
    assert read_json(file, "rows") == expected
    assert [row for _, row in read_rows(file, "rows")] == [expected]
