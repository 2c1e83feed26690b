"""The zoo of architectures that the reach test and the benchmarks draw from."""

import pytest
import torch

from benchmarks import zoo

MODALITIES = {"image", "text", "audio", "tabular", "sequence"}
FAMILIES = {"torchvision", "timm", "transformers", "torch"}


def train(case: zoo.Case, steps: int = 2) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Builds the case from a fixed seed and steps it by SGD; returns the losses and the final state."""
    torch.manual_seed(0)
    model, batch = case.build(), case.batch(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        loss = case.compute_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict()


def test_names_are_unique():
    assert len({case.name for case in zoo.CASES}) == len(zoo.CASES) >= 40


def test_every_family_and_modality_is_there():
    assert {case.family for case in zoo.CASES} == FAMILIES
    assert {case.modality for case in zoo.CASES} == MODALITIES


def test_what_does_not_capture_says_why():
    assert [case.name for case in zoo.CASES if not case.captures and not case.note] == []


def test_a_case_is_found_by_its_name():
    assert zoo.case("mlp").name == "mlp"
    with pytest.raises(KeyError, match=r"no case named 'resnet19'.*resnet18"):
        zoo.case("resnet19")


@pytest.mark.parametrize("name", ["embedding_mlp", "shufflenet_v2_x0_5", "llama_lora"])
def test_a_case_trains_and_repeats_itself(name):
    """One of each kind: two inputs, one input, a dict with labels and frozen weights."""
    losses, state = train(zoo.case(name))
    again, state_again = train(zoo.case(name))
    assert all(torch.isfinite(torch.tensor(losses))) and losses[0] != losses[1]
    assert losses == again
    assert all(torch.equal(state[key], state_again[key]) for key in state)


def test_only_adapters_and_a_new_head_are_trained():
    model = zoo.case("vit_lora").build()
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in key or key.startswith("classifier.") for key in trained)


def test_shapes_follow_the_batch_size():
    """Every tensor of every batch has the batch as its first axis."""
    for case in zoo.CASES:
        batch = case.batch(3)
        tensors = list(batch.values()) if isinstance(batch, dict) else batch
        assert {len(each) for each in tensors} == {3}, case.name
        assert (case.loss is None) == isinstance(batch, dict), case.name
