"""The compiler's own total, from the files that it writes."""

import pytest

from mapo_jax.errors import UserError
from tpu.memory import assign, assigned

REPORT = """Memory Space: smem (color=2)
Total bytes: 8 (8B)

Memory Space: default (color=0)
Total bytes: 20197502976 (18.81GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
"""


def test_the_total_of_a_chips_memory_is_read(tmp_path):
    assert assigned(tmp_path) is None
    file = tmp_path / "module_0000.jit_update.after_optimizations-memory-usage-report.txt"
    file.write_text(REPORT[:40])
    assert assigned(tmp_path) is None  # not written to its end
    file.write_text(REPORT)
    assert assigned(tmp_path) == 20_197_502_976


def test_a_compilation_that_ends_without_a_total_is_an_error_with_its_words(tmp_path):
    arguments = ["--config", "configs/qwen3_8b_v5p.yaml", "--slice", "v5p-100", "--programs", "train"]
    with pytest.raises(UserError, match=r"assigned no memory: error: there is no slice 'v5p-100'"):
        assign(tmp_path, arguments)


def test_reports_of_two_programs_are_not_mixed(tmp_path, capsys):
    from tpu.compile import main

    (tmp_path / "a.memory-usage-report.txt").write_text(REPORT)
    arguments = ["--config", "configs/qwen3_8b_v5p.yaml", "--slice", "v5p-8", "--dump", str(tmp_path)]
    assert main(arguments) == 2
    assert "`--dump` keeps the reports of one program" in capsys.readouterr().err
    assert main([*arguments, "--programs", "train"]) == 2
    assert "has the reports of a program already" in capsys.readouterr().err
