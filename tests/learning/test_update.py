"""The update against torch, and its invariances. Tiny models; random inputs from numpy."""

import dataclasses
import functools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mapo_jax.config import AlgorithmConfig, MeshConfig, OptimizerConfig
from mapo_jax.learning.batch import Batch
from mapo_jax.learning.optimizer import Optimizer, learning_rate_schedule, make_muon, make_optimizer
from mapo_jax.learning.train_state import abstract_state, create_state
from mapo_jax.learning.update import (
    Scoring,
    SupervisedBatch,
    fetch,
    make_scorer,
    make_supervised_update,
    make_update,
)
from mapo_jax.model.lora import LoRA, join, merge, split
from mapo_jax.model.qwen import QwenConfig, parameter_shapes
from mapo_jax.model.sharding import make_mesh, param_shardings
from mapo_jax.model.tensor_names import as_stored, read_params, tensor_names
from mapo_jax.running.metrics import CompileCounter

CONFIG = QwenConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rope_theta=5e6,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)
SCORING = Scoring(CONFIG, temperature=0.8, vocabulary_size=37)
# With plain descent of rate 1 the new weights show the gradient: params - new = gradient.
DESCENT = Optimizer(optax.sgd(1.0), lambda step: jnp.float32(1.0))
ROWS, LENGTH = 4, 12
DEFAULT = AlgorithmConfig()
# Every term of the objective at once, with bounds that the random rows hit.
EVERYTHING = AlgorithmConfig(
    clip_low=0.1,
    clip_high=0.15,
    dual_clip=1.4,
    aggregation="sequence-mean",
    old_logprobs="trainer",
    importance_cap=1.2,
    kl_coefficient=0.3,
    kl_estimator="k3",
    entropy_coefficient=0.2,
)


def to_huggingface(params):
    """Every tensor under its Hugging Face name and in its layout."""
    read = read_params(params)
    return {name: as_stored(read, *place) for name, place in tensor_names(CONFIG).items()}


def make_params(seed):
    """Weights large enough for log-probabilities to differ much from uniform."""
    random = np.random.default_rng(seed)

    def leaf(path, shape):
        around = 1.0 if path[-1].key == "scale" else 0.0
        return (around + random.normal(0, 0.25, shape.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, parameter_shapes(CONFIG))


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Half the compile time, which is most of these tests' cost; the tiny programs need no speed."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def params():
    return make_params(0)


def make_rows(seed=0):
    """A random batch; row 3 has no loss token, the others have different numbers of them."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 37, (ROWS, LENGTH)).astype(np.int32)
    mask = random.random((ROWS, LENGTH)) < np.array([[0.6], [0.3], [0.5], [0.0]])
    mask[:, 0] = False
    old = np.where(mask, -3.6 + random.normal(0, 0.5, mask.shape), 0).astype(np.float32)
    return Batch(
        tokens=tokens,
        positions=np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape),
        mask=mask,
        sampler_logprobs=old,
        old_logprobs=old,
        advantages=np.where(mask, random.normal(0, 1.5, mask.shape), 0).astype(np.float32),
    )


def state_of(params, optimizer, **options):
    return create_state(jax.tree.map(jnp.array, params), optimizer, **options)


@functools.cache
def descent(algorithm=DEFAULT, scoring=SCORING, **options):
    """The compiled update by plain descent; tests share what is compiled."""
    return make_update(scoring, DESCENT, algorithm, **options)


def gradient_of(params, batch, *, reference=None, **options):
    """(metrics, gradient) through the public update."""
    state = state_of(params, DESCENT)
    state = dataclasses.replace(state, reference=reference)
    state, metrics = descent(**options)(state, batch)
    return fetch([metrics]), jax.tree.map(lambda old, new: old - np.asarray(new), params, state.params)


@functools.cache
def adamw():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.01), 4)
    return optimizer, make_update(SCORING, optimizer, DEFAULT)


def assert_trees_close(one, other, relative):
    """Relative to the largest entry of each array."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(one)[0], jax.tree.leaves(other), strict=True
    ):
        scale = np.abs(b).max() + 1e-9
        assert np.abs(a - b).max() <= relative * scale, jax.tree_util.keystr(path)


def assert_trees_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_schedule_by_hand():
    rate = learning_rate_schedule(0.4, 10, warmup=0.2, schedule="cosine")
    # Two warm-up updates: 0.2, 0.4; then 0.2 (1 + cos(pi k/8)), k = 0 .. 7.
    expected = [0.2, 0.4] + [0.2 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    np.testing.assert_allclose([rate(i) for i in range(10)], expected, rtol=1e-5)
    constant = learning_rate_schedule(0.4, 10, warmup=0.2, schedule="constant")
    np.testing.assert_allclose([constant(i) for i in range(4)], [0.2, 0.4, 0.4, 0.4], rtol=1e-6)
    unwarmed = learning_rate_schedule(0.4, 1, warmup=0.05, schedule="cosine")
    assert float(unwarmed(0)) == pytest.approx(0.4)
    with pytest.raises(ValueError, match="linear"):
        learning_rate_schedule(0.4, 1, warmup=0, schedule="linear")


def test_optimizer_equals_torch():
    """Several steps of AdamW, clipping at work, against torch's own; float32, so 1e-6 absolute."""
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    start = {"a": {"kernel": random.normal(size=(3, 4)), "bias": random.normal(size=4)}}
    start |= {"norm": {"scale": random.normal(size=4)}, "embed": {"embedding": random.normal(size=(5, 4))}}
    start = jax.tree.map(lambda leaf: leaf.astype(np.float32), start)
    settings = OptimizerConfig(
        learning_rate=0.03, schedule="cosine", warmup=0.4, weight_decay=0.7, gradient_clip=2.5
    )
    optimizer = make_optimizer(settings, 5, b2=0.95)

    theirs = jax.tree.map(lambda leaf: torch.nn.Parameter(torch.tensor(leaf)), start)
    groups = [
        {"params": [theirs["a"]["kernel"], theirs["embed"]["embedding"]], "weight_decay": 0.7},
        {"params": [theirs["a"]["bias"], theirs["norm"]["scale"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95))
    ours, opt_state = start, optimizer.transform.init(start)
    for step in range(5):
        gradient = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), start)
        updates, opt_state = optimizer.transform.update(gradient, opt_state, ours)
        ours = optax.apply_updates(ours, updates)
        for parameter, value in zip(jax.tree.leaves(theirs), jax.tree.leaves(gradient), strict=True):
            parameter.grad = torch.tensor(value)
        torch.nn.utils.clip_grad_norm_(jax.tree.leaves(theirs), 2.5)
        for group in reference.param_groups:
            # Warm-up of 2 updates, then cosine over 3.
            group["lr"] = [0.015, 0.03, 0.03, 0.0225, 0.0075][step]
        reference.step()
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other.detach().numpy(), atol=1e-6)


def orthogonalised(gradient, steps=5):
    """The quintic Newton-Schulz iteration of the Muon post (Jordan et al. 2024), in float64."""
    x = gradient / np.linalg.norm(gradient)
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def test_first_step_of_muon_by_numpy():
    """Each layer's kernel as a matrix of inputs by outputs; the rest by AdamW with Nesterov's momentum."""
    random = np.random.default_rng(0)
    shapes = {"q": (2, 6, 2, 4), "o": (2, 2, 4, 6), "gate": (2, 6, 10)}  # [layer, ...]
    layers = {name: {"kernel": random.normal(size=shape)} for name, shape in shapes.items()}
    start = {"layers": layers | {"norm": {"scale": np.ones((2, 6))}}, "embed": {"embedding": np.ones((5, 6))}}
    start = jax.tree.map(lambda leaf: leaf.astype(np.float32), start)
    gradient = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), start)
    settings = OptimizerConfig(learning_rate=0.03, warmup=0, weight_decay=0.5, gradient_clip=2.5)
    optimizer = make_muon(settings, 7, b2=0.95)
    step, _ = optimizer.transform.update(gradient, optimizer.transform.init(start), start)

    for name, (inputs, outputs) in {"q": (6, 8), "o": (8, 6), "gate": (6, 10)}.items():
        for layer in range(2):
            matrix = gradient["layers"][name]["kernel"][layer].astype(np.float64).reshape(inputs, outputs)
            scale = 0.2 * np.sqrt(max(inputs, outputs))
            decay = 0.5 * start["layers"][name]["kernel"][layer]
            expected = -0.03 * (scale * orthogonalised(matrix).reshape(decay.shape) + decay)
            np.testing.assert_allclose(step["layers"][name]["kernel"][layer], expected, atol=3e-6)
    # Both moments are the gradient's: its sign is left, times the momentum a step ahead; no decay here.
    ahead = 0.9 * 0.1 / (1 - 0.9**2) + 1
    for part, sign in zip(
        (step["layers"]["norm"]["scale"], step["embed"]["embedding"]),
        (np.sign(gradient["layers"]["norm"]["scale"]), np.sign(gradient["embed"]["embedding"])),
        strict=True,
    ):
        np.testing.assert_allclose(part, -0.03 * ahead * sign, rtol=1e-4)  # Adam's epsilon


def test_muons_moments_lie_where_their_weights_lie():
    """A layer's kernel has one moment, anything else two; each is cut like its weights."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    shapes = parameter_shapes(CONFIG)
    shardings = param_shardings(shapes, mesh)
    state = abstract_state(shapes, make_muon(OptimizerConfig(), 4), shardings=shardings)
    weights = dict(jax.tree_util.tree_leaves_with_path(shardings))
    moments = Counter()
    for path, moment in jax.tree_util.tree_leaves_with_path(state.opt_state):
        for own, sharding in weights.items():
            if path[-len(own) :] == own:
                moments[own] += 1
                assert moment.sharding == sharding
    one = {own for own in weights if own[0].key == "layers" and own[-1].key == "kernel"}
    assert moments == {own: 1 if own in one else 2 for own in weights}


def loose_rows(seed=0):
    """Rows whose trainer's and sampler's log-probabilities differ, around those of `make_params(0)`."""
    random = np.random.default_rng(seed)
    batch = make_rows(seed)
    trainer = np.asarray(scorer()(make_params(0), batch))
    noise = [np.where(batch.mask, random.normal(0, 0.4, trainer.shape), 0).astype(np.float32) for _ in "ab"]
    return dataclasses.replace(batch, old_logprobs=trainer + noise[0], sampler_logprobs=trainer + noise[1])


@functools.cache
def scorer():
    return make_scorer(SCORING)


def torch_objective(model, reference, batch, torch):
    """EVERYTHING, written again from the formulas in torch: (loss, kinds of bounds that were hit)."""
    tokens = torch.tensor(batch.tokens, dtype=torch.long)

    def scores(network):
        logits = network(tokens).logits[:, :-1] / 0.8
        logits[:, :, 37:] = float("-inf")
        return torch.log_softmax(logits, -1)

    everything = scores(model)
    with torch.no_grad():
        fixed = scores(reference).gather(-1, tokens[:, 1:, None])[..., 0]
    logprobs = everything.gather(-1, tokens[:, 1:, None])[..., 0]
    entropy = -(everything.exp() * everything.clamp(min=-1e9)).sum(-1)
    old, sampler, advantage = (
        torch.tensor(array[:, 1:]) for array in (batch.old_logprobs, batch.sampler_logprobs, batch.advantages)
    )
    ratio = (logprobs - old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.15) * advantage)
    bounded = torch.where(advantage < 0, torch.maximum(gain, 1.4 * advantage), gain)
    weight = (old - sampler).exp().clamp(max=1.2)
    kl = (fixed - logprobs).exp() - 1 - (fixed - logprobs)
    token_loss = -weight * bounded + 0.3 * kl - 0.2 * entropy
    mask = torch.tensor(batch.mask[:, 1:])
    rows = [token_loss[row][mask[row]].mean() for row in range(ROWS) if mask[row].any()]
    hit = {
        "above": ((ratio > 1.15) & (advantage > 0) & mask).any(),
        "below": ((ratio < 0.9) & (advantage < 0) & mask).any(),
        "dual": ((ratio > 1.4) & (advantage < 0) & mask).any(),
        "weight": ((old - sampler > math.log(1.2)) & mask).any(),
    }
    return sum(rows) / len(rows), hit


def test_update_equals_torch(params):
    """Loss and gradient of the whole objective on transformers' own Qwen3; float32 on both sides: 1e-4."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def network(weights):
        model = transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(
                vocab_size=CONFIG.vocab_size,
                hidden_size=CONFIG.hidden_size,
                intermediate_size=CONFIG.intermediate_size,
                num_hidden_layers=CONFIG.num_layers,
                num_attention_heads=CONFIG.num_heads,
                num_key_value_heads=CONFIG.num_kv_heads,
                head_dim=CONFIG.head_dim,
                rms_norm_eps=CONFIG.rms_norm_eps,
                tie_word_embeddings=False,
                rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope_theta},
            )
        )
        model.load_state_dict({name: torch.tensor(value) for name, value in to_huggingface(weights).items()})
        return model

    batch, reference = loose_rows(), make_params(1)
    model = network(params)
    loss, hit = torch_objective(model, network(reference), batch, torch)
    assert all(hit.values()), hit
    loss.backward()
    expected = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}

    metrics, gradient = gradient_of(
        params, batch, reference=jax.tree.map(jnp.array, reference), algorithm=EVERYTHING
    )
    assert metrics["actor/loss"] == pytest.approx(loss.item(), rel=1e-5)
    norm = math.sqrt(sum(float((value**2).sum()) for value in expected.values()))
    assert metrics["actor/grad_norm"] == pytest.approx(norm, rel=1e-5)
    found = to_huggingface(gradient)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-4 * max(1, np.abs(value).max()), err_msg=name)


@pytest.mark.parametrize(
    ("algorithm", "remat"),
    [(DEFAULT, "none"), (EVERYTHING, "none"), (EVERYTHING, "block"), (DEFAULT, "offload")],
    ids=["token-mean", "sequence-mean", "in place", "in place, from the host"],
)
def test_microbatches_add_up_to_the_whole(params, algorithm, remat):
    """Relative 1e-6 of each gradient's largest entry: float32 rounding of another order of sums."""
    batch, reference = loose_rows(), jax.tree.map(jnp.array, make_params(1))
    whole, gradient = gradient_of(params, batch, algorithm=algorithm, reference=reference)
    reference = jax.tree.map(jnp.array, make_params(1))
    scoring = dataclasses.replace(SCORING, remat=remat)
    options = dict(algorithm=algorithm, scoring=scoring, microbatch_tokens=2 * LENGTH)
    parts, summed = gradient_of(params, batch, reference=reference, **options)
    for g, s, p in zip(*map(jax.tree.leaves, (gradient, summed, params)), strict=True):
        # A gradient read off the new weights also has their rounding, 6e-8 of the weight, twice.
        assert np.abs(g - s).max() <= 1e-6 * np.abs(g).max() + 1.3e-7 * np.abs(p).max()
    assert parts == pytest.approx(whole, rel=2e-6, abs=1e-7)


def test_what_stands_outside_the_mask_changes_nothing(params):
    batch = make_rows()
    holes = dataclasses.replace(
        batch,
        advantages=np.where(batch.mask, batch.advantages, np.nan),
        old_logprobs=np.where(batch.mask, batch.old_logprobs, np.nan),
        sampler_logprobs=np.where(batch.mask, batch.sampler_logprobs, np.inf),
    )
    update = descent()
    clean, clean_metrics = update(state_of(params, DESCENT), batch)
    dirty, dirty_metrics = update(state_of(params, DESCENT), holes)
    assert_trees_equal(clean, dirty)
    assert fetch([clean_metrics]) == fetch([dirty_metrics])


def test_a_non_finite_loss_or_no_loss_token_keeps_the_state(params):
    optimizer, update = adamw()
    batch = make_rows()
    state, _ = update(state_of(params, optimizer), batch)
    before = jax.tree.map(np.array, state)

    advantages = batch.advantages.copy()
    advantages[0, np.flatnonzero(batch.mask[0])[0]] = np.nan
    state, metrics = update(state, dataclasses.replace(batch, advantages=advantages))
    assert fetch([metrics])["actor/skipped"] == 1
    assert_trees_equal(state, before)

    state, metrics = update(state, dataclasses.replace(batch, mask=np.zeros_like(batch.mask)))
    assert fetch([metrics])["actor/skipped"] == 0
    assert fetch([metrics])["actor/loss_tokens"] == 0
    assert_trees_equal(state, before)

    state, metrics = update(state, batch)
    assert fetch([metrics])["actor/skipped"] == 0 and int(state.step) == 2


def test_only_loss_tokens_go_through_the_head_and_none_is_lost(params):
    batch = make_rows()
    most = int(batch.mask.sum(axis=1).max())
    fewer = dataclasses.replace(batch, mask=batch.mask & (np.cumsum(batch.mask, axis=1) < most))
    scoring = dataclasses.replace(SCORING, loss_tokens=most - 1)
    whole, gradient = gradient_of(params, fewer)
    short, same = gradient_of(params, fewer, scoring=scoring)
    assert short == pytest.approx(whole, rel=2e-6)
    assert_trees_close(same, gradient, 3e-6)  # the head's sums run in another order
    metrics, _ = gradient_of(params, batch, scoring=scoring)
    assert metrics["actor/skipped"] == 1, "a row with too many loss tokens must not be cut in silence"


def test_an_entropy_that_is_only_reported_is_not_differentiated(params):
    """Beside what the bonus adds to the loss itself, a handful, the update has a backward pass less."""

    def program(coefficient):
        algorithm = DEFAULT.model_copy(update={"entropy_coefficient": coefficient})
        update = make_update(SCORING, DESCENT, algorithm)
        return str(jax.make_jaxpr(update)(state_of(params, DESCENT), make_rows())).count(" = ")

    assert program(0.01) - program(0.0) > 15


def test_scorer_gives_the_trainers_logprobs(params):
    batch = make_rows()
    trainer = np.asarray(scorer()(params, batch))
    np.testing.assert_array_equal(trainer[~batch.mask], 0)
    np.testing.assert_allclose(make_scorer(SCORING, microbatch_tokens=1)(params, batch), trainer, atol=1e-5)
    metrics, _ = gradient_of(params, dataclasses.replace(batch, sampler_logprobs=trainer))
    assert metrics["sampler/logprob_diff_max"] < 1e-5
    metrics, _ = gradient_of(params, batch)
    difference = np.abs(trainer - batch.sampler_logprobs)[batch.mask]
    assert metrics["sampler/logprob_diff_mean"] == pytest.approx(difference.mean(), rel=1e-4)
    assert metrics["sampler/logprob_diff_max"] == pytest.approx(difference.max(), rel=1e-4)


def test_a_steady_update_compiles_nothing_and_donates(params):
    optimizer, update = adamw()
    state, _ = update(state_of(params, optimizer), make_rows(0))
    with CompileCounter() as counter, counter.steady():
        for seed in (1, 2):
            previous = state
            state, metrics = update(state, make_rows(seed))
        fetch([metrics])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((previous.params, previous.opt_state)))


def test_fetch_combines_the_updates_of_a_step():
    names = ("actor/pg_loss", "actor/ratio_max", "actor/skipped", "actor/lr", "sampler/logprob_diff_mean")
    updates = [dict(zip(names, row, strict=True)) for row in [(1.0, 5, 0, 9, 7), (3.0, 4, 1, 8, 6)]]
    assert fetch(updates) == dict(zip(names, (2, 5, 1, 8, 7), strict=True))


def supervised_rows(texts, masks, length):
    """Packs each list of texts into one row."""
    shape = (len(texts), length)
    batch = SupervisedBatch(
        *(np.zeros(shape, np.int32) for _ in range(2)), np.full(shape, -1, np.int32), np.zeros(shape, bool)
    )
    for row, (parts, flags) in enumerate(zip(texts, masks, strict=True)):
        start = 0
        for segment, (part, flag) in enumerate(zip(parts, flags, strict=True)):
            end = start + len(part)
            batch.tokens[row, start:end], batch.mask[row, start:end] = part, flag
            batch.positions[row, start:end] = np.arange(len(part))
            batch.segments[row, start:end] = segment
            start = end
    return batch


def test_supervised_update_is_the_mean_negative_log_likelihood_packed_or_not(params):
    random = np.random.default_rng(3)
    texts = [random.integers(0, 37, size) for size in (5, 7, 4, 6)]
    masks = [random.random(len(text)) < 0.6 for text in texts]
    masks[1][0] = True  # a text's first token cannot be predicted and must not count
    update = make_supervised_update(SCORING, DESCENT)
    alone = supervised_rows([[text] for text in texts], [[mask] for mask in masks], LENGTH)
    packed = supervised_rows([texts[:2], texts[2:], [], []], [masks[:2], masks[2:], [], []], LENGTH)
    (apart, params_apart), (together, params_together) = (
        (fetch([metrics]), jax.tree.map(np.asarray, state.params))
        for state, metrics in (update(state_of(params, DESCENT), rows) for rows in (alone, packed))
    )
    assert apart["loss_tokens"] == sum(int(mask[1:].sum()) for mask in masks)
    assert together == pytest.approx(apart, rel=1e-5)
    assert_trees_close(params_together, params_apart, 1e-5)  # attention sums other zeros

    alone.mask[:, 0] = False
    zeros = np.zeros(alone.mask.shape, np.float32)
    logprobs = scorer()(params, Batch(alone.tokens, alone.positions, alone.mask, zeros, zeros, zeros))
    assert apart["loss"] == pytest.approx(-float(np.asarray(logprobs)[alone.mask].mean()), rel=1e-5)


# --- Adapters. ---

LORA = LoRA(rank=2, alpha=3.0, targets=("q", "o", "gate", "down"))
ADAPTED = dataclasses.replace(SCORING, config=dataclasses.replace(CONFIG, lora=LORA))


def adapted_params():
    random = np.random.default_rng(5)
    shapes = split(parameter_shapes(ADAPTED.config))[0]
    adapters = jax.tree.map(lambda leaf: random.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    return join(make_params(0), adapters)


def test_adapters_alone_are_trained_by_the_chain_rule():
    """dA = s dW B^T and dB = s A^T dW, with dW the gradient of all weights where the merged weights stand.

    The reference of the KL term is the frozen base, and needs no copy.
    """
    params, scale = adapted_params(), 3 / 2
    base = split(params)[1]
    batch = loose_rows()
    state = state_of(params, DESCENT, reference=True)
    assert state.reference is None
    state, metrics = descent(EVERYTHING, ADAPTED)(state, batch)
    assert_trees_equal(state.base, base)
    merged = jax.tree.map(np.asarray, merge(params, LORA))
    reference = jax.tree.map(jnp.array, base)
    expected, whole = gradient_of(merged, batch, algorithm=EVERYTHING, reference=reference)
    found = fetch([metrics])
    for name in ("actor/loss", "actor/kl", "actor/entropy"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    old, new = split(params)[0]["layers"], state.params["layers"]
    for part, names in (("attention", "qo"), ("mlp", ("gate", "down"))):
        for name in names:
            for layer in range(CONFIG.num_layers):
                dw = whole["layers"][part][name]["kernel"][layer]
                a, b = (old[part][name][side][layer] for side in ("lora_a", "lora_b"))
                rows = dw.reshape(a.size // 2, -1)
                da, db = scale * rows @ b.reshape(2, -1).T, scale * a.reshape(-1, 2).T @ rows
                for side, right in (("lora_a", da), ("lora_b", db)):
                    mine = old[part][name][side][layer] - np.asarray(new[part][name][side][layer])
                    # relative 1e-4 of the largest entry: merged weights round and sum in another order
                    np.testing.assert_allclose(
                        mine.reshape(right.shape), right, atol=1e-4 * np.abs(right).max() + 1e-6
                    )


def test_moments_and_checkpointed_weights_are_those_of_adapters():
    optimizer, _ = adamw()
    state = state_of(adapted_params(), optimizer)
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * trained and trained < 0.5 * sum(leaf.size for leaf in jax.tree.leaves(state.base))
    assert jax.tree.structure(state.weights) == jax.tree.structure(adapted_params())
