"""Sharding changes no number, and memory is what the forecast says: on eight virtual devices.

In processes of their own, because the number of virtual devices is fixed when jax starts.
"""

from pathlib import Path

import jax
import pytest

from mapo_jax.config import MeshConfig, load_config
from mapo_jax.errors import UserError
from mapo_jax.learning.programs import make_programs
from mapo_jax.model.qwen import QwenConfig, parameter_count
from mapo_jax.model.sharding import make_mesh
from mapo_jax.running import forecast, memory
from tests.forked import run_on_devices

HERE = str(Path(__file__).parent)


def test_every_mesh_learns_what_one_device_learns():
    """Log-probabilities within 1e-5, gradients, clipped, within 1e-4 of their largest entry, twenty losses.

    Weights and moments stay where they are, cut over all devices.

    The same curve: at every step within a thousandth of the curve's range (found: 6e-5 at most). Rounding
    alone tells the meshes apart: a millionth of a gradient, which AdamW shows in full where an entry is
    itself a millionth of the others, but there it moves the loss least.
    """
    script = """
        import dataclasses, sys, jax, numpy as np
        sys.path.insert(0, sys.argv[1])
        jax.config.update("jax_disable_most_optimizations", True)
        import test_update as tiny
        from mapo_jax.config import AlgorithmConfig, MeshConfig, OptimizerConfig
        from mapo_jax.model.lora import split
        from mapo_jax.model.qwen import parameter_shapes
        from mapo_jax.model.sharding import make_mesh, param_shardings
        from mapo_jax.learning.update import fetch, place
        from mapo_jax.learning.train_state import create_state
        from mapo_jax.learning.optimizer import make_optimizer
        from mapo_jax.learning.update import make_scorer, make_update

        plain = dataclasses.replace(
            tiny.CONFIG, vocab_size=64, hidden_size=32, intermediate_size=48, num_heads=8, num_kv_heads=8
        )
        adapted = dataclasses.replace(plain, lora=tiny.LORA)
        optimizer = make_optimizer(OptimizerConfig(learning_rate=0.003, gradient_clip=0.1), 20)
        algorithm = AlgorithmConfig(kl_coefficient=0.1, entropy_coefficient=0.02)

        def rows(seed):
            parts = tiny.make_rows(2 * seed), tiny.make_rows(2 * seed + 1)
            return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)

        def weights(config):
            random = np.random.default_rng(1)

            def leaf(path, shape):
                around = 1.0 if path[-1].key == "scale" else 0.0
                return (around + random.normal(0, 0.2, shape.shape)).astype(np.float32)

            return jax.tree_util.tree_map_with_path(leaf, parameter_shapes(config))

        def learn(config, sizes, score=True):
            data, fsdp, tensor = sizes
            axes = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
            mesh = make_mesh(axes, jax.devices()[: int(np.prod(sizes))])
            shardings = param_shardings(parameter_shapes(config), mesh)
            remat = "block" if sizes == (2, 2, 2) else "none"  # sums micro-batches in place
            scoring = dataclasses.replace(
                tiny.SCORING, config=config, vocabulary_size=61, mesh=mesh, remat=remat
            )
            params = jax.device_put(weights(config), shardings)
            budget = 2 * tiny.LENGTH  # of each device: two rows at a time, one where there is one
            logprobs = None
            if score:
                scorer = make_scorer(scoring, microbatch_tokens=budget)
                logprobs = np.asarray(scorer(params, place(rows(0), mesh)))
            state = create_state(params, optimizer, shardings=shardings, reference=True)
            update = make_update(scoring, optimizer, algorithm, microbatch_tokens=budget, shardings=shardings)
            curve, gradient = [], None
            placed = jax.tree.map(lambda leaf: leaf.sharding, state.params)
            for step in range(20):
                state, metrics = update(state, place(rows(step % 2), mesh))
                found = fetch([metrics])
                curve.append(found["actor/loss"])
                assert jax.tree.map(lambda leaf: leaf.sharding, state.params) == placed
                if gradient is None:  # the first moment is a tenth of it
                    assert found["actor/grad_norm"] > 0.1, "nothing is clipped"
                    for moment in jax.tree.leaves(state.opt_state):
                        assert moment.ndim == 0 or len(moment.sharding.device_set) == np.prod(sizes)
                    adam = state.opt_state[1][0]
                    gradient = jax.tree.map(lambda leaf: 10 * np.asarray(leaf), adam.mu)
            assert update._cache_size() == 1
            return logprobs, gradient, np.array(curve)

        for config, meshes in ((plain, [(1, 8, 1), (1, 1, 8), (2, 2, 2)]), (adapted, [(2, 2, 2)])):
            scored = config is plain
            alone, gradient, curve = learn(config, (1, 1, 1), scored)
            span = curve.max() - curve.min()
            assert span > 0.1, "nothing is learnt"
            for sizes in meshes:
                logprobs, other, its_curve = learn(config, sizes, scored)
                if scored:
                    assert np.abs(logprobs - alone).max() <= 1e-5, sizes
                paths = jax.tree_util.tree_leaves_with_path(gradient)
                for (path, one), two in zip(paths, jax.tree.leaves(other), strict=True):
                    assert np.abs(one - two).max() <= 1e-4 * np.abs(one).max(), (sizes, path)
                apart = np.abs(curve - its_curve).max() / span
                print(sizes, config.lora is not None, "curves apart", apart)
                assert apart <= 1e-3, (sizes, curve, its_curve)
    """
    assert run_on_devices(script, 8, [HERE]).count("curves apart") == 4


def test_splash_on_a_mesh_equals_xla_on_one_device():
    """Interpreted; 2 x 2 x 2 devices, of which two share a row's heads. Ragged blocks, two texts in a row."""
    script = """
        import jax, jax.numpy as jnp, numpy as np
        from mapo_jax.config import MeshConfig
        from mapo_jax.model import backends
        from mapo_jax.model.attention import causal_attention
        from mapo_jax.model.qwen import QwenConfig
        from mapo_jax.model.sharding import make_mesh

        config = QwenConfig(
            vocab_size=8, hidden_size=32, intermediate_size=8, num_layers=1,
            num_heads=8, num_kv_heads=4, head_dim=16,
        )
        backends.SPLASH_BLOCK = 128
        mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
        splash = backends.row_attention("splash", mesh, config, "float32")
        numbers = np.random.default_rng(0)
        *inputs, weights = (
            numbers.normal(size=(4, 200, heads, 16)).astype(np.float32) for heads in (8, 4, 4, 8)
        )
        two = np.where(np.arange(200) < 70, 0, 1) * np.array([[0], [1], [0], [1]])

        def value_and_gradient(attend, segments):
            def total(inputs):
                output = attend(*inputs, segments)
                return jnp.sum(output * weights), output

            return jax.jit(jax.value_and_grad(total, has_aux=True))(inputs)

        for segments in (None, two):
            (_, found), gradient = value_and_gradient(splash, segments)
            (_, expected), right = value_and_gradient(causal_attention, segments)
            # As on one device: up to 200 terms of order 1, added up in another order.
            np.testing.assert_allclose(found, expected, atol=2e-6)
            for one, other in zip(gradient, right, strict=True):
                np.testing.assert_allclose(one, other, atol=2e-5)
        print("equal", len(found.sharding.device_set))
    """
    assert run_on_devices(script, 8).strip() == "equal 8"


MODEL = QwenConfig(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=384,
    num_layers=6,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    tie_word_embeddings=False,
)


def settings(*overrides):
    """Eight rows of 256 tokens to an update."""
    return load_config(
        None,
        [
            "rollout.scenarios=2",
            "training.minibatch_scenarios=2",
            "rollout.rollouts=4",
            "rollout.max_tokens=256",
            "rollout.max_turns=4",
            "rollout.min_turns=2",
            "rollout.max_reply_tokens=16",
            "model.attention=xla",
            *overrides,
        ],
    )


@pytest.mark.slow
def test_the_forecast_of_an_updates_memory_is_near_the_compilers():
    """All that a device holds while it updates, within 10 %; every policy, sizes between weights and rows."""
    script = """
        import dataclasses, sys, jax, jax.numpy as jnp, numpy as np
        sys.path.insert(0, sys.argv[1])
        from test_scale import MODEL, settings
        from mapo_jax.model.lora import LoRA
        from mapo_jax.model.qwen import parameter_shapes
        from mapo_jax.model.sharding import batch_sharding, make_mesh, param_shardings
        from mapo_jax.learning.batch import Batch
        from mapo_jax.running.memory import forecast_memory
        from mapo_jax.learning.programs import make_programs
        from mapo_jax.learning.train_state import abstract_state

        kinds = dict(
            tokens=jnp.int32, positions=jnp.int32, mask=jnp.bool_,
            sampler_logprobs=jnp.float32, old_logprobs=jnp.float32, advantages=jnp.float32,
        )

        def compiled(config, model, mesh):
            programs = make_programs(config, model, model.vocab_size, mesh)
            state = abstract_state(
                parameter_shapes(model, config.model.dtype),
                programs.optimizer,
                shardings=param_shardings(parameter_shapes(model), mesh),
                reference=config.algorithm.kl_coefficient > 0,
            )
            rows = config.training.minibatch_scenarios * config.rollout.rollouts
            place = batch_sharding(mesh)
            shape = (rows, config.rollout.max_tokens)
            batch = Batch(**{n: jax.ShapeDtypeStruct(shape, k, sharding=place) for n, k in kinds.items()})
            figures = programs.update.lower(state, batch).compile().memory_analysis()
            returned = figures.output_size_in_bytes - figures.alias_size_in_bytes
            return figures.argument_size_in_bytes + figures.temp_size_in_bytes + returned

        wide = dataclasses.replace(MODEL, hidden_size=256, intermediate_size=768, vocab_size=2048)
        adapted = dataclasses.replace(wide, lora=LoRA(8, 16.0, ("q", "v", "down")))
        cases = [
            (MODEL, ["training.microbatch_tokens=1024"]),
            (MODEL, ["training.microbatch_tokens=1024", "model.remat=minimal"]),
            (wide, ["training.microbatch_tokens=512", "model.remat=block", "algorithm.kl_coefficient=0.1"]),
            (adapted, ["training.microbatch_tokens=1024", "model.remat=block", "lora.rank=8"]),
            (wide, ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "model.remat=block"]),
        ]
        for model, overrides in cases:
            config = settings(*overrides)
            devices = jax.devices()[: 8 if config.mesh.data == 2 else 1]
            mesh = make_mesh(config.mesh, devices)
            found = forecast_memory(config, model, mesh)
            expected = sum(found.held.values()) + sum(found.update.values())
            actual = compiled(config, model, mesh)
            print(f"{expected / 1e6:.2f} MB forecast, {actual / 1e6:.2f} MB compiled", overrides, flush=True)
            print({k: round(v / 1e6, 2) for k, v in (found.held | found.update).items()}, flush=True)
            assert abs(expected / actual - 1) <= 0.1, (expected, actual, overrides)
    """
    run_on_devices(script, 8, [HERE])


def test_what_does_not_fit_is_said_with_figures_before_anything_is_spent(monkeypatch):
    config = settings()
    mesh = make_mesh(config.mesh)
    monkeypatch.setattr(forecast, "device_memory", lambda mesh: 10 * 2**20)
    with pytest.raises(UserError, match=r"need 0\.\d GiB of each device, which has 0\.0 GiB; .*lora\.rank"):
        forecast.check_memory(config, MODEL, mesh)
    found = memory.forecast_memory(config, MODEL, mesh)
    needed = sum((found.held | found.rollout).values())
    assert found.update["gradient"] < sum(found.rollout.values())
    monkeypatch.setattr(forecast, "device_memory", lambda mesh: needed - 1)
    with pytest.raises(UserError, match=r"while dialogues are held .*KV caches .* lower rollout\.slots"):
        forecast.check_memory(config, MODEL, mesh)
    monkeypatch.setattr(forecast, "device_memory", lambda mesh: needed)
    forecast.check_memory(config, MODEL, mesh)


def test_an_update_that_an_accelerator_cannot_hold_is_said_before_the_first_dialogue(
    monkeypatch, absent_device
):
    asked = []

    class Update:
        """Says what it takes: at once, as a TPU's compiler, or when it is asked."""

        def __init__(self, error=None):
            self.error = error
            self.argument_size_in_bytes, self.temp_size_in_bytes = 60 * 2**30, 20 * 2**30
            self.peak_memory_in_bytes = 75 * 2**30

        def lower(self, state, batch):
            asked.append(batch)
            return self

        def compile(self):
            if self.error:
                raise jax.errors.JaxRuntimeError(self.error)
            return self

        def memory_analysis(self):
            return self

    accelerator = make_mesh(MeshConfig(), [absent_device(0, 0, "gpu")])
    monkeypatch.setattr(forecast, "device_memory", lambda mesh: 79 * 2**30)
    tpu = Update("RESOURCE_EXHAUSTED: it takes 81 GiB of 79")
    with pytest.raises(UserError, match=r"rows of 256 tokens .* takes 81 GiB of 79; lower training\.micro"):
        forecast.check_update(tpu, None, settings(), accelerator)
    assert asked[0].tokens.shape == (8, 256)
    with pytest.raises(UserError, match=r"it needs 80\.0 GiB of 79\.0; lower training\.micro"):
        forecast.check_update(Update(), None, settings(), accelerator)
    of_tpus = make_mesh(MeshConfig(), [absent_device(0, 0, "tpu")])
    forecast.check_update(Update(), None, settings(), of_tpus)  # the compiler has accepted it
    monkeypatch.setattr(forecast, "device_memory", lambda mesh: 74 * 2**30)
    with pytest.raises(UserError, match=r"it needs 75\.0 GiB of 74\.0"):
        forecast.check_update(Update(), None, settings(), of_tpus)
    with pytest.raises(jax.errors.JaxRuntimeError):
        forecast.check_update(Update("INTERNAL: a defect"), None, settings(), accelerator)
    monkeypatch.setattr(forecast, "device_memory", lambda mesh: 80 * 2**30)
    forecast.check_update(Update(), None, settings(), accelerator)
    asked.clear()
    forecast.check_update(tpu, None, settings(), make_mesh(MeshConfig(), [absent_device(0, 0)]))
    assert not asked  # a CPU has the machine's memory, and starts at once


def test_the_table_of_memory_names_every_kind():
    config = settings("lora.rank=4", "rollout.copy_weights=true", "algorithm.kl_coefficient=0.1")
    found = memory.forecast_memory(config, forecast.model_shape(config), make_mesh(config.mesh))
    lines = forecast.memory_table(found)
    for kind in ("weights that are trained", "frozen weights (float32)", "AdamW's moments", "gradient"):
        assert any(kind in line for line in lines), kind
    for kind in ("copy of the weights", "KV caches", "kept for the backward pass (remat none)", "together"):
        assert any(kind in line for line in lines), kind
    assert not any("reference" in line for line in lines)  # the base is the reference


def test_of_several_processes_each_samples_on_its_own_devices(absent_device):
    """Two hosts of four chips: each holds half of the dialogues, and the weights cut by `tensor` alone."""
    mesh = make_mesh(MeshConfig(tensor=2), [absent_device(i, i // 4) for i in range(8)])
    token = 6 * 2 * 4 * 16 * 4  # layers, keys and values, heads, features, float32
    caches = 4 * 256 * token / 4  # 4 of 8 dialogues, over the four chips of a host
    logits = 3 * 4 * 2 * 512  # three float32 copies for two lanes of half the vocabulary
    matrices = parameter_count(MODEL) - 128 * (2 * 6 + 1) - 16 * 2 * 6  # without norms, which are not cut
    norms = 4 * (parameter_count(MODEL) - matrices)
    rollout = memory.forecast_memory(settings("rollout.copy_weights=false"), MODEL, mesh).rollout
    assert rollout == {
        "weights of a host (float32)": 4 * matrices / 2 + norms,
        "KV caches (float32)": caches,
        "logits of the lanes": logits,
    }
    # Not asked for: none on an accelerator, one on a CPU.
    accelerators = make_mesh(MeshConfig(tensor=2), [absent_device(i, i // 4, "tpu") for i in range(8)])
    assert memory.forecast_memory(settings(), MODEL, accelerators).rollout == rollout
    # The copy is cut over the host's four chips; two of them cut nothing while the weights are gathered.
    rollout = memory.forecast_memory(settings(), MODEL, mesh).rollout
    assert rollout["copy of the weights (float32)"] == 4 * matrices / 4 + norms
    assert rollout["more, while it is made"] == 4 * matrices / 2 + norms - caches - logits
    with pytest.raises(
        UserError, match=r"`rollout.scenarios` is 3; it must be a multiple of the 2 processes"
    ):
        forecast.forecast_memory(
            settings("rollout.scenarios=3", "training.minibatch_scenarios=3", "rollout.rollouts=8"),
            MODEL,
            mesh,
        )


def test_rows_that_a_mesh_cannot_share_are_refused():
    config = settings("training.minibatch_scenarios=1", "rollout.rollouts=4")
    mesh = type("Mesh", (), {"shape": {"data": 2, "fsdp": 3, "tensor": 1}})()
    with pytest.raises(UserError, match=r"the 4 rows .* 6 devices of mesh.data=2 x mesh.fsdp=3"):
        make_programs(config, MODEL, 1000, mesh)
