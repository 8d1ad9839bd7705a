"""Likelihood against a brute force over whole sequences, on all families; generation; context; what is reported."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import tiny
from contextlora.data.collate import Encoder, collate
from contextlora.data.examples import load_examples
from contextlora.errors import ConfigError, DataError
from contextlora.evaluation import evaluate as module
from contextlora.evaluation.evaluate import answer, context_for, evaluate, option_sets, same_length, score_options
from contextlora.lora.attach import attach, decoder_layers, gated_layers
from contextlora.models.inputs import ImageFeatures
from contextlora.models.prompts import KnownPrompts

FAMILIES = [tiny.llama, tiny.llava, tiny.idefics3, tiny.qwen25vl]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)


def graph():
    tasks = tiny.graph().to_dict()["tasks"]
    tasks["action"]["choose"] = 2
    return tiny.graph(tasks=tasks)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {k: tiny.write_data(folder / str(k), train=2, test=9, images=k) for k in (False, True)}


def prepared(family, folders, dtype=torch.float64, blocks=True):
    model, processor = family(dtype)
    if blocks:
        attach(model, graph(), dtype=dtype)
        generator = torch.Generator().manual_seed(1)
        for layer in gated_layers(model).values():
            layer.B.copy_(torch.randn(layer.B.shape, generator=generator, dtype=torch.float64) * 0.3)
    data = folders[family is not tiny.llama]
    return model, processor, data, ImageFeatures(model, Encoder(processor, graph()))


def brute_force(reader, example, task, candidates):
    """Each candidate's whole sequence through the model by itself, summed log-probabilities of its own tokens."""
    found = []
    for c in candidates:
        sample = reader.encoder.sample(example, task, answer=c)
        with torch.no_grad(), module.under(reader.model, task):
            logits = reader.model(**reader.inputs(collate([sample], 0))).logits[0]
        logp, start = logits.log_softmax(-1), len(sample.prompt)
        found.append(sum(logp[start + k - 1, token].item() for k, token in enumerate(sample.answer)))
    return torch.tensor(found, dtype=torch.float64)


def test_option_sets():
    assert option_sets(graph(), "light") == [("day",), ("night",)]
    sets = option_sets(graph(), "action")
    assert len(sets) == len(set(sets)) == 4 + 6
    assert ("stop", "slow down") in sets
    many = [f"o{i}" for i in range(64)]
    big = tiny.graph(tasks={"t": {"question": "?", "options": many, "choose": 8}, "u": {"question": "?"}})
    assert option_sets(big, "t") == option_sets(big, "u") == []  # 5 x 10^9 sets are not asked one by one


@every_family
@pytest.mark.parametrize("task", ["weather", "action"])
def test_likelihood_equals_brute_force(family, folders, task):
    """Answers of one to six tokens, one or two options, prompts of several lengths, images of several sizes."""
    model, _processor, data, reader = prepared(family, folders)
    examples = load_examples(data, graph(), split="test")[:6]
    candidates = option_sets(graph(), task)
    assert len({len(reader.encoder.answer_ids(c)) for c in candidates}) > 1
    samples = [reader.encoder.sample(e, task) for e in examples]
    assert len({len(s.prompt) for s in samples}) > 1
    for part in same_length(samples, 4):
        with torch.no_grad(), module.under(model, task):
            found = score_options(reader, collate([samples[i] for i in part], 0), candidates)
            quick = score_options(reader, collate([samples[i] for i in part], 0), candidates, likeliest=True)
        for row, few, i in zip(found, quick, part, strict=True):
            exact = brute_force(reader, examples[i], task, candidates)
            assert torch.allclose(row, exact, rtol=0, atol=1e-9)
            assert few.argmax() == exact.argmax()
            assert few.max().item() == pytest.approx(exact.max().item(), abs=1e-9)
            assert (few >= exact - 1e-9).all(), "what is left out keeps an upper bound"
    picked = answer(reader, examples, task)
    for e in examples:
        assert picked[e.id] == candidates[brute_force(reader, e, task, candidates).argmax()]


OWN = [("cat", "a dog"), ("a dog", "stop", "cat"), ("slow down now", "stop"), None, ("cat", "a dog")]


@every_family
def test_examples_with_options_of_their_own(family, folders):
    """Each is answered by the likeliest of its own, as asked one by one; one without any writes its answer."""
    own = tiny.graph(tasks={"quiz": {"question": "what is this ?"}, "weather": {"question": "how is the weather ?"}})
    model, processor = family(torch.float64)
    attach(model, own, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for layer in gated_layers(model).values():
        layer.B.copy_(torch.randn(layer.B.shape, generator=generator, dtype=torch.float64) * 0.3)
    reader = ImageFeatures(model, Encoder(processor, own))
    known = load_examples(folders[family is not tiny.llama], own, split="test")[: len(OWN)]
    examples = [replace(e, options={"quiz": o} if o else {}) for e, o in zip(known, OWN, strict=True)]
    found = answer(reader, examples, "quiz")
    for e, o in zip(examples, OWN, strict=True):
        assert found[e.id] == answer(reader, [e], "quiz")[e.id]
        if o:
            sets = option_sets(own, "quiz", o)
            assert found[e.id] == sets[brute_force(reader, e, "quiz", sets).argmax()]
    written = answer(reader, examples, "quiz", method="generate")
    assert all(set(written[e.id]) <= set(o) for e, o in zip(examples, OWN, strict=True) if o)


def test_a_sure_answer_leaves_nothing_to_read_on(folders):
    """One option so likely that no other's first token beats its whole answer, as after training."""
    model, _processor, data, reader = prepared(tiny.llama, folders)
    sample = reader.encoder.sample(load_examples(data, graph(), split="test")[0], "weather")
    sure = reader.encoder.answer_ids(("heavy snow",))
    head = model.get_output_embeddings()
    before = head.forward
    follows = iter([sure[:1], sure[1:]])

    def certain(hidden):
        logits = torch.full_like(before(hidden), -60.0)
        logits[range(len(logits)), next(follows)] = 0.0
        return logits

    head.forward = certain
    with torch.no_grad(), module.under(model, "weather"):
        found = score_options(reader, collate([sample], 0), option_sets(graph(), "weather"), likeliest=True)
    assert option_sets(graph(), "weather")[int(found.argmax())] == ("heavy snow",)


@every_family
def test_scoring_in_parts_and_without_an_image_after_one(family, folders, monkeypatch):
    """More candidates than fit at once; and Qwen2.5-VL keeps an older batch's image positions: not for this one."""
    model, _processor, data, reader = prepared(family, folders)
    example = load_examples(data, graph(), split="test")[2]
    candidates = option_sets(graph(), "action")
    answer(reader, [example], "action")
    blind = replace(example, image=None)
    monkeypatch.setattr(module, "MAX_ROWS", 4)
    for e in (blind, example):
        with torch.no_grad(), module.under(model, "action"):
            batch = collate([reader.encoder.sample(e, "action")], 0)
            found = score_options(reader, batch, candidates)
        assert torch.allclose(found[0], brute_force(reader, e, "action", candidates), rtol=0, atol=1e-9)


@every_family
@pytest.mark.parametrize("layers", ["top 1/3", "all"])
def test_known_prompts_change_nothing_but_the_work(family, folders, layers):
    """Asked again under other blocks: bit-equal to asking anew, and nothing below the blocks is computed."""
    model, processor = family(torch.float64)
    attach(model, graph(), dtype=torch.float64, layers=layers)
    reader = ImageFeatures(model, Encoder(processor, graph()))
    examples = load_examples(folders[family is not tiny.llama], graph(), split="test")[:5]
    lowest = decoder_layers(model)[1][0].self_attn
    prompts = []
    lowest.register_forward_pre_hook(
        lambda _, args, kwargs: prompts.append(kwargs["hidden_states"].shape[1] > 6), with_kwargs=True
    )
    candidates = option_sets(graph(), "action")
    samples = [reader.encoder.sample(e, "action") for e in examples]

    def asked():
        found = []
        with torch.no_grad(), model.tasks("action"):
            for part in same_length(samples, 4):
                found.append(score_options(reader, collate([samples[i] for i in part], 0), candidates))
        return found

    known = KnownPrompts(model, 2**30)
    for fill in (0.1, 0.2):
        for layer in gated_layers(model).values():
            layer.B.fill_(fill)
        reader.prompts = None
        plain = asked()
        reader.prompts, prompts[:] = known, []
        again = asked()
        assert any(prompts) == (layers == "all" or fill == 0.1)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    reader.prompts = KnownPrompts(model, 0)
    assert all(torch.equal(a, b) for a, b in zip(plain, asked(), strict=True)), "no memory, nothing kept"


@every_family
def test_answers_do_not_depend_on_the_batch(family, folders, monkeypatch):
    _model, _processor, data, reader = prepared(family, folders)
    examples = load_examples(data, graph(), split="test")[:5]
    monkeypatch.setattr(module, "MAX_NEW_TOKENS", 6)
    for method in ("likelihood", "generate"):
        together = answer(reader, examples, "weather", method=method)
        assert together == {e.id: answer(reader, [e], "weather", method=method)[e.id] for e in examples}


def test_the_task_answers_under_its_own_gate(folders):
    model, _processor, data, reader = prepared(tiny.llama, folders)
    example = load_examples(data, graph(), split="test")[0]
    candidates = option_sets(graph(), "weather")
    batch = collate([reader.encoder.sample(example, "weather")], 0)
    with torch.no_grad():
        base = score_options(reader, batch, candidates)
        with model.tasks("weather"):
            own = score_options(reader, batch, candidates)
    assert not torch.allclose(base, own)
    plain = prepared(tiny.llama, folders, blocks=False)[3]
    with torch.no_grad(), module.under(plain.model, "weather"):
        assert torch.equal(score_options(plain, batch, candidates), base)


@every_family
def test_generation_equals_a_greedy_loop(family, folders):
    model, processor, data, reader = prepared(family, folders)
    marker = getattr(model.config, "image_token_id", None)  # a random model may write one, without an image to it
    for e in load_examples(data, graph(), split="test")[:4]:
        sample = reader.encoder.sample(e, "weather")
        batch = collate([sample], 0)
        ids = []
        while len(ids) < 6 and (not ids or ids[-1] not in (tiny.END, marker)):
            grown = collate([reader.encoder.sample(e, "weather")], 0)
            grown = type(grown)(
                grown.samples,
                torch.cat([batch.input_ids, torch.tensor([ids], dtype=torch.long)], 1),
                torch.ones(1, len(sample.prompt) + len(ids), dtype=torch.long),
                *[getattr(grown, k) for k in ("predicts", "targets", "owner")],
            )
            with torch.no_grad(), module.under(model, "weather"):
                ids.append(int(model(**reader.inputs(grown)).logits[0, -1].argmax()))
        with torch.no_grad(), module.under(model, "weather"):
            (text,) = module._generate(reader, batch, len(ids))
        assert text == processor_text(processor, ids)


def processor_text(processor, ids):
    tokenizer = getattr(processor, "tokenizer", processor)
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_generated_answers_are_checked_for_their_format(folders, monkeypatch):
    _model, _processor, data, reader = prepared(tiny.llama, folders)
    says = iter(["rain", "It rains", "heavy snow", "rain, sun", "", "sun", "sun", "sun", "sun"])
    limits = []

    def say(reader, batch, tokens):
        limits.append(tokens)
        return [next(says) for _ in batch.samples]

    monkeypatch.setattr(module, "_generate", say)
    found = answer(reader, load_examples(data, graph(), split="test"), "weather", method="generate")
    assert sorted(found.values()) == [(), (), ("heavy snow",), ("rain",), ("rain", "sun"), *[("sun",)] * 4]
    assert set(limits) == {module.MAX_NEW_TOKENS}


def test_a_long_answer_has_room_to_be_generated():
    long = " ".join(["rain"] * 60)
    g = tiny.graph(tasks={"t": {"question": "?", "options": [long, "sun"], "choose": 2}})
    assert module._longest(Encoder(tiny.tokenizer(), g), "t", ()) >= len(
        Encoder(tiny.tokenizer(), g).answer_ids([long, "sun"])
    )


def test_evaluate_reports_the_metric_of_its_answers(folders):
    model, processor, data, _reader = prepared(tiny.llama, folders)
    seen = []
    found = evaluate(model, processor, graph(), data=data, progress=lambda *a: seen.append(a))
    examples = load_examples(data, graph(), split="test")
    assert list(found.accuracy) == ["weather", "light", "action"]
    for task, accuracy in found.accuracy.items():
        table = [module.score(found.answers[task][e.id], e.answers[task]) for e in examples]
        assert accuracy.mean == pytest.approx(sum(table) / 9)
        assert accuracy.count == 9
    assert seen == sorted(set(seen))
    assert {(9, 27), (18, 27), (27, 27)} <= set(seen)
    some = evaluate(model, processor, graph(), data=data, tasks=["action"])
    assert some.accuracy == {"action": found.accuracy["action"]}


def test_wrong_calls(folders):
    model, processor, data, _ = prepared(tiny.llama, folders)
    with pytest.raises(ConfigError, match=r"E104 .*'wether'.*Did you mean 'weather'"):
        evaluate(model, processor, graph(), data=data, tasks=["wether"])
    with pytest.raises(DataError, match="E230"):
        evaluate(model, processor, graph(), data=data, split="valid")


@pytest.mark.parametrize("tasks", [None, ["action"]])
def test_context(folders, tasks):
    """Gold: labels; predicted: the prerequisites' own answers, also where they are not evaluated themselves."""
    model, processor, data, reader = prepared(tiny.llama, folders)
    examples = load_examples(data, graph(), split="test")
    own = {t: answer(reader, examples, t) for t in ("weather", "light")}
    gold = {e.id: {p: e.answers[p] for p in own} for e in examples}
    predicted = {e.id: {p: own[p][e.id] for p in own} for e in examples}
    assert context_for(reader, examples, "action", dict.fromkeys(graph().names, "none"), {}) == {}
    assert context_for(reader, examples, "action", dict.fromkeys(graph().names, "gold"), {}) == gold != predicted
    assert context_for(reader, examples, "action", dict.fromkeys(graph().names, "predicted"), {}) == predicted
    for context, known in (("none", None), ("gold", gold), ("predicted", predicted)):
        found = evaluate(model, processor, graph(), data=data, context=context, tasks=tasks)
        assert found.answers["action"] == answer(reader, examples, "action", known=known)


def test_gold_context_without_some_labels(tmp_path):
    data = tiny.write_data(tmp_path, train=1, test=4)
    records = [json.loads(x) for x in (data / "data.jsonl").read_text().splitlines()]
    del records[2]["answers"]["light"]
    (data / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    model, processor = tiny.llama()
    reader = ImageFeatures(model, Encoder(processor, graph()))
    examples = load_examples(data, graph(), split="test")
    found = context_for(reader, examples, "action", dict.fromkeys(graph().names, "gold"), {})
    assert [sorted(k) for k in found.values()] == [["light", "weather"], ["weather"], *[["light", "weather"]] * 2]
    assert evaluate(model, processor, graph(), data=data, context="gold").accuracy["light"].count == 3
