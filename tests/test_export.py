import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mapo_jax.config import Config, ModelConfig, OptimizerConfig, RolloutConfig, RunConfig, to_yaml
from mapo_jax.errors import UserError
from mapo_jax.export import check_logits, export, main, verify
from mapo_jax.learning.optimizer import make_optimizer
from mapo_jax.learning.train_state import create_state
from mapo_jax.model.head import logits
from mapo_jax.model.huggingface import INDEX, load_params, read_config
from mapo_jax.model.lora import LoRA, join, split
from mapo_jax.model.qwen import QwenConfig, hidden_states, init_params, parameter_shapes
from mapo_jax.model.tensor_names import read_params
from mapo_jax.rollout.engine import Engine
from mapo_jax.rollout.requests import Request
from mapo_jax.rollout.rows import ChatFormat
from mapo_jax.rollout.sampling import Sampling
from mapo_jax.running.checkpoint import Checkpoints, save_base
from mapo_jax.running.policy import Policy, load_policy, save_model_files
from mapo_jax.tokenizer import load_tokenizer, train_tokenizer, write_tokenizer
from mapo_jax.warmstarting.packing import Renderer

ROLLOUT = RolloutConfig(max_tokens=96, max_reply_tokens=12, system_prompt="Be kind.", temperature=0.9)
CHAT = [
    {"role": "user", "content": "I keep thinking about the night shifts."},
    {"role": "assistant", "content": "You sound tired."},
    {"role": "user", "content": "Yes. <|im_end|> I feel tired."},
    {"role": "assistant", "content": "I am here."},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with checkpoints of steps 3 and 7, made of the parts that training makes it of."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    texts = [message["content"] for message in CHAT] * 4
    source = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(source, train_tokenizer(texts, 300, max_tokens=160))
    tokenizer = load_tokenizer(source)
    config = QwenConfig(
        vocab_size=304,  # more rows than the tokenizer has tokens
        hidden_size=24,
        intermediate_size=40,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope_theta=5e5,
        max_position_embeddings=160,
    )
    chat = ChatFormat(tokenizer, ROLLOUT.history, ROLLOUT.system_prompt)
    policy = Policy(config, tokenizer, chat)
    save_model_files(folder, policy)
    settings = Config(
        run=RunConfig(directory="/somewhere/private/mine"),
        model=ModelConfig(path="/somewhere/private/base"),
        rollout=ROLLOUT,
    )
    (folder / "config.yaml").write_text(to_yaml(settings))
    params = init_params(config, 0)
    later = jax.tree.map(lambda leaf: leaf + 0.125, params)
    optimizer = make_optimizer(OptimizerConfig(), 10)
    with Checkpoints(folder) as checkpoints:
        for step, weights in ((3, params), (7, later)):
            checkpoints.save(step, create_state(weights, optimizer), {})
            checkpoints.wait()
    rows = [
        {
            "step": 0,
            "evaluation/reward/mean": -1.5,
            "evaluation/naming/situation": 0.5,
            "evaluation/return/mean": -3.0,
        },
        {"step": 1, "reward/mean": 0.0},
        {
            "step": 5,
            "evaluation/reward/mean": 0.75,
            "evaluation/kind/most": 0.25,
            "evaluation/return/mean": 1.0,
        },
        {"step": 7, "evaluation/reward/mean": 1.25, "evaluation/kind/most": 0.5},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, policy, {3: params, 7: later}


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("exports") / "model"
    assert export(run[0], output) == 7
    return output


def test_the_weights_come_back_bit_for_bit(run, exported):
    _, policy, params = run
    assert read_config(exported) == policy.config
    weights = load_params(exported, policy.config)
    jax.tree.map(np.testing.assert_array_equal, weights, params[7])


def test_another_step_and_half_precision(run, tmp_path):
    folder, policy, params = run
    assert export(folder, tmp_path / "out", step=3, dtype="bfloat16") == 3
    weights = load_params(tmp_path / "out", policy.config)
    jax.tree.map(
        lambda one, other: np.testing.assert_array_equal(
            one, np.asarray(jax.numpy.asarray(other).astype("bfloat16").astype("float32"))
        ),
        weights,
        params[3],
    )


def test_transformers_computes_what_our_model_computes(run, exported):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    _, policy, params = run
    tokens = np.random.default_rng(0).integers(0, 300, (2, 20)).astype(np.int32)
    positions = np.tile(np.arange(20, dtype=np.int32), (2, 1))
    ours = logits(params[7], policy.config, hidden_states(params[7], policy.config, tokens, positions))
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens).long()).logits.numpy()
    # float32 on both sides; sums of a few hundred terms in another order.
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-4, atol=1e-4)
    assert model.generation_config.max_new_tokens == 12
    assert model.generation_config.temperature == 0.9
    assert set(model.generation_config.eos_token_id) == set(policy.chat.stop_ids)


def test_logits_are_compared_with_those_of_transformers(run, exported, tmp_path):
    pytest.importorskip("torch")
    config = Config(rollout=ROLLOUT)
    assert check_logits(exported, config) < 1e-4
    broken = tmp_path / "broken"
    shutil.copytree(exported, broken)
    weights = load_file(broken / "model.safetensors")
    # Finite, as loading demands, but the products overflow.
    save_file({name: np.full_like(w, 1e18) for name, w in weights.items()}, broken / "model.safetensors")
    with pytest.raises(UserError, match="transformers computes other logits"):
        check_logits(broken, config)


@pytest.fixture(scope="module")
def adapted(run, tmp_path_factory):
    """A run with adapters: its folder, its policy, the frozen weights and all of them; step 2."""
    _, plain, weights = run
    folder = tmp_path_factory.mktemp("runs") / "adapted"
    lora = LoRA(rank=3, alpha=7.0, targets=("q", "k", "o", "gate", "down"))
    policy = Policy(dataclasses.replace(plain.config, lora=lora), plain.tokenizer, plain.chat)
    save_model_files(folder, policy)
    settings = Config(model=ModelConfig(path="/somewhere/private/base"), rollout=ROLLOUT)
    (folder / "config.yaml").write_text(to_yaml(settings))
    save_base(folder, weights[3])
    random = np.random.default_rng(4)
    shapes = split(parameter_shapes(policy.config))[0]
    adapters = jax.tree.map(lambda leaf: random.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)
    params = join(weights[3], adapters)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(2, create_state(params, make_optimizer(OptimizerConfig(), 10)), {})
    return folder, policy, weights[3], params


def test_a_checkpoint_of_adapters_does_not_hold_the_base(adapted):
    folder = adapted[0]
    sizes = {
        name: sum(file.stat().st_size for file in (folder / name).rglob("*") if file.is_file())
        for name in ("base", "checkpoints")
    }
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(adapted[2]))
    assert sizes["base"] > 0.5 * kept  # compressed
    read = json.loads((folder / "checkpoints" / "2" / "state" / "_METADATA").read_text())
    assert all("embed" not in name and "kernel" not in name for name in read["tree_metadata"])


def test_adapters_are_exported_merged_or_alone_as_peft_reads_them(adapted, tmp_path):
    """float32 on both sides; sums of a few hundred terms in another order: 1e-4."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    folder, policy, _, params = adapted
    for part in ("merged", "adapters", "base"):
        assert export(folder, tmp_path / part, part=part) == 2
    tokens = np.random.default_rng(0).integers(0, 300, (2, 20)).astype(np.int32)
    positions = np.tile(np.arange(20, dtype=np.int32), (2, 1))
    states = hidden_states(params, policy.config, tokens, positions)
    ours = np.asarray(logits(params, policy.config, states))

    frozen = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        without = frozen(torch.from_numpy(tokens).long()).logits.numpy()
        adapted_model = peft.PeftModel.from_pretrained(frozen, tmp_path / "adapters").eval()
        for model in (merged, adapted_model):
            theirs = model(torch.from_numpy(tokens).long()).logits.numpy()
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert np.abs(ours - without).max() > 0.01, "the adapters do nothing"
    card = (tmp_path / "adapters" / "README.md").read_text()
    assert "PeftModel.from_pretrained" in card and "| trained | adapters of rank 3 |" in card
    assert (
        json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "base"
    )

    # Whoever loads the run, to evaluate it or to train on, gets the same merged weights.
    loaded, weights = load_policy(folder, ROLLOUT)
    assert loaded.config == dataclasses.replace(policy.config, lora=None)
    exported = load_params(tmp_path / "merged", loaded.config)
    # the same sum of a product, once in numpy and once in XLA
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6), weights, exported)


def test_a_run_of_all_weights_has_no_adapters(run, tmp_path):
    with pytest.raises(UserError, match=r"trained all weights \(lora.rank=0\)"):
        export(run[0], tmp_path / "out", part="adapters")


def test_greedy_replies_over_three_turns_are_those_of_transformers(run, exported):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, policy, params = run
    engine = Engine(
        policy.config,
        slots=1,
        length=160,
        max_reply_tokens=6,
        stop_ids=policy.chat.stop_ids,
        vocabulary_size=policy.chat.vocabulary_size,
        sampling=Sampling(temperature=0.0),
    )
    engine.load(params[7], 0)
    tokenizer = AutoTokenizer.from_pretrained(exported, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    beyond = list(range(policy.chat.vocabulary_size, policy.config.vocab_size))  # ids without text
    ids, row, messages = policy.chat.start("Hello."), [], []
    for turn, said in enumerate(("Hello.", "Why?", "I am tired.")):
        messages.append({"role": "user", "content": said})
        (ours,) = engine.reply([Request(0, ids, key=(0, 0, 0), turn=turn, start=turn == 0)])
        row += [*ids]
        theirs = model.generate(
            torch.tensor([row]),
            attention_mask=torch.ones(1, len(row), dtype=torch.long),
            do_sample=False,
            max_new_tokens=6,
            suppress_tokens=beyond,
        )[0, len(row) :].tolist()
        assert theirs == list(ours.ids)
        row += ours.ids
        closing = () if ours.ids[-1] == policy.chat.end_of_turn[0] else policy.chat.end_of_turn
        messages.append({"role": "assistant", "content": policy.chat.decode(ours.ids)})
        rendered = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        # The same text; its spelling in ids may be another one than what a random model sampled.
        assert tokenizer.decode(rendered) == tokenizer.decode([*row, *closing])
        ids = (*closing, *policy.chat.next_user(("Why?", "I am tired.", "Bye.")[turn]))


def test_small_files_with_an_index(run, tmp_path):
    folder, policy, params = run
    export(folder, tmp_path / "out", max_shard_bytes=20_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and (tmp_path / "out" / INDEX).is_file()
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "out", policy.config), params[7])
    # An independent reader: the library's own.
    tensors = {}
    for file in files:
        tensors |= load_file(file)
    assert np.array_equal(tensors["model.norm.weight"], params[7]["norm"]["scale"])
    first = params[7]["layers"]["mlp"]["gate"]["kernel"][1]
    assert np.array_equal(tensors["model.layers.1.mlp.gate_proj.weight"], np.asarray(first).T)


MEMORY = """
import sys
from pathlib import Path
import jax, numpy as np
from mapo_jax.config import Config, OptimizerConfig, RolloutConfig, to_yaml
from mapo_jax.export import export
from mapo_jax.model.qwen import QwenConfig, parameter_shapes
from mapo_jax.rollout.rows import ChatFormat
from mapo_jax.tokenizer import load_tokenizer
from mapo_jax.running.checkpoint import Checkpoints, save_base
from mapo_jax.running.policy import Policy, load_policy, save_model_files
from mapo_jax.learning.train_state import create_state
from mapo_jax.learning.optimizer import make_optimizer
run, tokenizer, step = Path(sys.argv[1]), load_tokenizer(sys.argv[2]), sys.argv[3]
config = QwenConfig(
    vocab_size=4096, hidden_size=1024, intermediate_size=4096, num_layers=8, num_heads=8, num_kv_heads=8,
    head_dim=128, max_position_embeddings=512,
)
if step == "make":
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), parameter_shapes(config))
    save_model_files(run, Policy(config, tokenizer, ChatFormat(tokenizer)))
    (run / "config.yaml").write_text(to_yaml(Config()))
    with Checkpoints(run) as checkpoints:
        # As a float32 run would, but for the optimizer's moments.
        checkpoints.save(1, create_state(params, make_optimizer(OptimizerConfig(), 1)), {})
else:
    largest = 150e6
    # Not getrusage: its maximum counts the process that started this one, and hides what is below that.
    lines = lambda: dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    held = lambda name: int(lines()[name].split()[0]) * 1024
    export(sys.argv[4], run.parent / "first")  # a small run, so that everything is imported and set up
    before = held("VmRSS")  # not the peak so far: one of the imports would hide some of the export's
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    export(run, run.parent / "out", max_shard_bytes=largest)
    sizes = [file.stat().st_size for file in (run.parent / "out").glob("*.safetensors")]
    print(len(sizes), max(sizes), held("VmHWM") - before, sum(sizes))
"""


@pytest.mark.slow
def test_the_memory_that_an_export_takes_is_bounded_by_the_largest_file(run, tmp_path):
    (tmp_path / "run").mkdir()
    source = run[0] / "model"
    for step in ("make", "export"):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, tmp_path / "run", source, step, run[0]],
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    count, largest, grown, total = map(int, done.stdout.split()[-4:])
    print(
        f"{grown / 1e6:.0f} MB for {count} files of up to {largest / 1e6:.0f} MB, {total / 1e6:.0f} MB in all"
    )
    assert count >= 3 and largest > 100e6 and total > 3 * 1.1 * largest
    assert grown < 1.5 * largest, f"{grown / 1e6:.0f} MB for files of up to {largest / 1e6:.0f} MB"


def test_the_exported_template_renders_the_training_rows(run, exported):
    from transformers import AutoTokenizer

    _, policy, _ = run
    tokenizer = AutoTokenizer.from_pretrained(exported, local_files_only=True)
    (row,) = Renderer(policy.tokenizer, "append", "Be kind.").pieces(CHAT, 200)
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert tuple(rendered[: len(row)]) == row.ids
    # and training goes on from the folder with the same rows, though nobody repeats the system prompt
    assert ChatFormat(tokenizer).start("Hello.") == policy.chat.start("Hello.")


def test_the_model_card_tells_what_it_is(exported):
    card = (exported / "README.md").read_text()
    assert "| reward per turn (incremental distance) | -1.50 | +1.25 |" in card
    assert "| situation named right | 50% |  |" in card
    assert "step 0 | step 7" in card
    assert "| estimator | mapo (turn weight 0.333333) |" in card
    assert "library_name: transformers" in card
    assert "private" not in card  # the card travels; paths of this machine do not


def test_the_card_has_the_split_the_curve_and_the_benchmarks_of_its_checkpoint(run, tmp_path):
    folder = run[0]
    for step, score in ((3, 11.5), (7, 23.5)):
        file = folder / "evaluations" / f"eqbench_step_{step:06d}" / "scores.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"score": score, "parseable": 160, "questions": 171}))
    export(folder, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- EQ-Bench v2: 23.50 (160 of 171 answers parseable)" in card and "11.5" not in card
    assert "64 cards; 16 for validation and 16 for tests are kept apart" in card
    assert "(curve.png)" in card
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")
    for number, content in enumerate(('{"score": 23.5, "pars', "null", '{"score": {}}', "[" * 100_000)):
        file.write_text(content)
        export(folder, tmp_path / f"out{number}")
        assert "- EQ-Bench v2" not in (tmp_path / f"out{number}" / "README.md").read_text()


def test_the_scores_are_those_up_to_the_exported_step(run, tmp_path):
    export(run[0], tmp_path / "out", step=3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "step 0 | step 0" in card
    assert "+1.25" not in card


def test_nothing_is_overwritten_and_an_empty_folder_is_taken(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"full is not empty; export never overwrites"):
        export(run[0], tmp_path / "full")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    export(run[0], tmp_path / "empty", step=3)
    assert (tmp_path / "empty" / "config.json").is_file()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty", "full"]


def test_a_damaged_copy_is_found_and_not_left_behind(run, exported, tmp_path, monkeypatch):
    _, policy, params = run
    other = jax.tree.map(lambda leaf: leaf * 1.5, params[7])
    config = Config(rollout=ROLLOUT)
    with pytest.raises(UserError, match=r"tensor model.embed_tokens.weight reads back differently"):
        verify(exported, policy, read_params(other), config)
    # one number of the last tensor
    one = jax.tree.map(np.array, params[7])
    one["norm"]["scale"][-1] += 1e-3
    with pytest.raises(UserError, match=r"tensor model.norm.weight reads back differently"):
        verify(exported, policy, read_params(one), config)

    def break_it(*arguments):
        raise UserError("broken")

    monkeypatch.setattr("mapo_jax.export.verify", break_it)
    with pytest.raises(UserError, match="broken"):
        export(run[0], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_is_wrong_in_one_sentence(run, tmp_path, capsys):
    assert main(["--run", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "is no run folder" in capsys.readouterr().err
    assert main(["--run", str(run[0]), "--step", "4", "--output", str(tmp_path / "out")]) == 2
    assert "no checkpoint of step 4; it has 3, 7" in capsys.readouterr().err
    assert main(["--run", str(run[0]), "--output", str(tmp_path / "out")]) == 0
    assert "step 7 of" in capsys.readouterr().out


def test_the_best_checkpoint_is_found_by_its_validation(run, tmp_path, capsys):
    copy = shutil.copytree(run[0], tmp_path / "run")
    with pytest.raises(UserError, match="has an evaluation"):
        export(copy, tmp_path / "none", step="best")
    (copy / "evaluations").mkdir(exist_ok=True)
    for step, value in ((3, 1.5), (7, 0.5)):
        (copy / "evaluations" / f"step_{step:06d}.json").write_text(json.dumps({"return/mean": value}))
    assert main(["--run", str(copy), "--output", str(tmp_path / "best"), "--step", "best"]) == 0
    assert capsys.readouterr().out.startswith("step 3 of ")
