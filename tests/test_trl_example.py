"""examples/trl_grpo.py: TRL's own trainer with our loss trains as it does with its own."""

import importlib.util
import sys
from pathlib import Path

import processes
import pytest
import torch

pytest.importorskip("trl")

from virft_fast.data.demo import build_demo
from virft_fast.models.processing import load_processor
from virft_fast.models.qwen_vl import load_model
from virft_fast.tasks import REWARDS

EXAMPLE = Path(__file__).parent.parent / "examples/trl_grpo.py"


def example():
    spec = importlib.util.spec_from_file_location("trl_grpo", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["trl_grpo"] = module
    spec.loader.exec_module(module)
    return module


def characters(completions, **columns):
    """A reward in which the completions of a group differ."""
    return [sum(map(ord, c[0]["content"])) % 17 / 17 for c in completions]


def make_trainer(trainer_class, folder, peft_config=None, model=None, processor=None, **options):
    """A trainer of the embedded model on digits, or of a `model` of text on their questions.

    A `model` with a `processor` of its own sees the digits too.
    """
    from trl import GRPOConfig

    data = build_demo("digits_classification", folder / "data", num_train=8, num_test=2)
    sees = model is None or processor is not None
    processor = processor or load_processor("tiny")
    if not sees:
        data = data.remove_columns("image")
        processor.tokenizer.chat_template = processor.chat_template
        processor = processor.tokenizer
    data = data.map(
        lambda row: {"prompt": [{"role": "user", "content": row["problem"]}]},
        remove_columns=["problem"],
    )
    settings = {
        "use_cpu": True, "max_steps": 3, "per_device_train_batch_size": 4, "num_generations": 4,
        "gradient_accumulation_steps": 2, "max_completion_length": 12, "seed": 3, "optim": "sgd",
        "learning_rate": 0.05, "logging_steps": 1, "report_to": "none", "save_strategy": "no",
        "bf16": False, "temperature": 0.9, "per_device_eval_batch_size": 4,
    }  # fmt: skip
    return trainer_class(
        model=model or load_model("tiny"),
        processing_class=processor,
        args=GRPOConfig(output_dir=str(folder / "out"), **(settings | options)),
        reward_funcs=[characters, REWARDS["format"]],
        train_dataset=data["train"],
        eval_dataset=data["test"],
        peft_config=peft_config,
    )


def train(trainer_class, folder, **options):
    trainer = make_trainer(trainer_class, folder, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


# The highest 8% are the first tokens; entropies below are so close that rounding orders them.
@pytest.mark.parametrize(
    "options",
    [{"beta": 0.1, "num_iterations": 2},
     {"loss_type": "grpo", "num_iterations": 2, "use_adaptive_entropy": True, "entropy_coef": 0.02,
      "entropy_target": 9.0, "top_entropy_quantile": 0.08},
     {"loss_type": "bnpo", "importance_sampling_level": "sequence", "beta": 0.1,
      "use_bias_correction_kl": False},
     {"loss_type": "sapo", "entropy_coef": 0.05, "off_policy_mask_threshold": 0.1}],
    ids=["defaults", "entropy", "bnpo", "sapo"],
)  # fmt: skip
def test_three_steps_give_trls_own_losses_and_weights(tmp_path, options):
    from trl import GRPOTrainer

    wanted, reference = train(GRPOTrainer, tmp_path / "trl", **options)
    losses, weights = train(example().FusedGRPOTrainer, tmp_path / "ours", **options)
    assert len(losses) == 3 and any(abs(loss) > 1e-4 for loss in wanted)
    assert losses == pytest.approx(wanted, abs=1e-5)
    start = dict(load_model("tiny").named_parameters())
    moved = torch.cat([(reference[name] - start[name]).flatten() for name in start])
    apart = torch.cat([(reference[name] - weights[name]).flatten() for name in start])
    assert moved.norm() > 0 and apart.norm() < 1e-4 * moved.norm()


def test_evaluation_and_lora_give_trls_own_losses(tmp_path):
    from peft import LoraConfig
    from trl import GRPOTrainer

    losses = []
    for trainer_class in (GRPOTrainer, example().FusedGRPOTrainer):
        torch.manual_seed(0)
        trainer = make_trainer(
            trainer_class, tmp_path / trainer_class.__name__, max_steps=1, eval_strategy="steps",
            eval_steps=1, loss_type="dapo", temperature=1.0,
            peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        )  # fmt: skip
        trainer.train()
        history = trainer.state.log_history
        losses.append([e[k] for e in history for k in ("loss", "eval_loss") if k in e])
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], abs=1e-5)


def text_model(kind):
    """A small model that changes its head's output."""
    import transformers

    sizes = {"vocab_size": load_model("tiny").config.text_config.vocab_size, "hidden_size": 32,
             "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 16}  # fmt: skip
    torch.manual_seed(1)
    if kind == "scaled":
        config = transformers.Cohere2Config(**sizes, logit_scale=0.5, pad_token_id=0)
        return transformers.Cohere2ForCausalLM(config)
    config = transformers.Gemma2Config(**sizes, final_logit_softcapping=0.3, pad_token_id=0)
    return transformers.Gemma2ForCausalLM(config)


@pytest.mark.parametrize("kind", ["saved", "scaled", "capped"])
def test_logits_give_trls_own_losses_where_the_head_cant_be_fused(tmp_path, caplog, kind):
    from peft import LoraConfig
    from trl import GRPOTrainer

    results = []
    for trainer_class in (GRPOTrainer, example().FusedGRPOTrainer):
        torch.manual_seed(0)
        with caplog.at_level("WARNING"):
            results.append(train(
                trainer_class, tmp_path / trainer_class.__name__, max_steps=2, num_iterations=2,
                model=None if kind == "saved" else text_model(kind),
                peft_config=LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
                if kind == "saved" else None,
            ))  # fmt: skip
    (wanted, reference), (losses, weights) = results
    assert len(losses) == 2 and losses == pytest.approx(wanted, abs=1e-5)
    for name, value in reference.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6)
    said = [r.message for r in caplog.records if "the loss is computed from logits" in r.message]
    assert len(said) == 1


IMAGE_TOKENS = {
    "gemma3": {"image_token": "<image>", "boi_token": "<start_of_image>", "eoi_token": "<eoi>"},
    "llava_next": {"image_token": "<image>"},
    "idefics3": {"image_token": "<image>"},
}


def vision_model(kind):
    """A small model of another family and its processor, which needs no torchvision."""
    import transformers
    import trl
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    template = Path(trl.__file__).parent / f"chat_templates/{kind}.jinja"
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=load_processor("tiny").tokenizer._tokenizer, padding_side="left",
        bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens=IMAGE_TOKENS[kind],
    )  # fmt: skip
    options = {"tokenizer": tokenizer, "chat_template": template.read_text()}
    size, pinpoints = {"height": 28, "width": 28}, [[28, 56], [56, 28]]
    if kind == "gemma3":
        images = Gemma3ImageProcessorPil(size=size)
        processor = transformers.Gemma3Processor(images, image_seq_length=4, **options)
        own = {"mm_tokens_per_image": 4}
    elif kind == "llava_next":
        images = LlavaNextImageProcessorPil(
            size={"shortest_edge": 28}, crop_size=size, image_grid_pinpoints=pinpoints
        )
        processor = transformers.LlavaNextProcessor(
            images, patch_size=14, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, **options,
        )  # fmt: skip
        own = {"image_grid_pinpoints": pinpoints}
    else:
        edges = {"longest_edge": 56}, {"longest_edge": 28}
        images = Idefics3ImageProcessorPil(size=edges[0], max_image_size=edges[1])
        processor = transformers.Idefics3Processor(images, image_seq_len=1, **options)
        own = {"scale_factor": 2}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 2}  # fmt: skip
    text = {"vocab_size": len(tokenizer), "num_key_value_heads": 1, "head_dim": 16, **sizes}
    token, names = tokenizer.convert_tokens_to_ids("<image>"), ("index", "id")
    config = transformers.AutoConfig.for_model(
        kind, text_config=text | {"pad_token_id": tokenizer.pad_token_id},
        vision_config={"image_size": 28, "patch_size": 14, **sizes},
        **own, **{f"image_token_{name}": token for name in names},
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    if kind == "gemma3":  # transformers leaves it at 0, and no image would be seen
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    return {"model": model, "processor": processor}


# Each has inputs of its own: token types, the images' sizes, several tiles an image.
@pytest.mark.parametrize("kind", ["gemma3", "llava_next", "idefics3"])
def test_other_families_give_trls_own_losses_and_weights(tmp_path, kind):
    from trl import GRPOTrainer

    trained, start = [], dict(vision_model(kind)["model"].named_parameters())
    for trainer_class in (GRPOTrainer, example().FusedGRPOTrainer):
        folder = tmp_path / trainer_class.__name__
        trained.append(train(trainer_class, folder, max_steps=2, **vision_model(kind)))
    (wanted, reference), (losses, weights) = trained
    assert len(losses) == 2 and losses == pytest.approx(wanted, abs=1e-5)
    vision = [name for name in start if "vision" in name or "projector" in name]
    for names in (start, vision):  # what the images give must train too
        moved = torch.cat([(reference[name] - start[name]).flatten() for name in names])
        apart = torch.cat([(reference[name] - weights[name]).flatten() for name in names])
        assert moved.norm() > 0 and apart.norm() < 1e-4 * moved.norm()


# FSDP2 by torch's own functions: accelerate has it on GPUs only.
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_give_trls_own_losses(tmp_path, kind):
    done = processes.run(tmp_path, kind, module="trl_two_ranks", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for wanted, got in zip(*torch.load(tmp_path / f"{kind}.pt"), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
