"""`route` belongs to the request: tasks, generators and threads that take turns never see each other's routing."""

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import moe_lora
import pytest
import torch
from moe_lora import MoELoRAConfig, Routing, slot
from torch import nn

x = torch.linspace(-1, 1, 12).view(2, 1, 6)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return self.down(self.up(x).relu())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = moe_lora.apply(Net(), MoELoRAConfig(8, 1, 2, dropout=0.0, target_modules="all-linear")).eval()
    for name, parameter in net.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter)
    return net.requires_grad_(False)


ROUTINGS = [Routing(torch.tensor([[e], [(e + 3) % 8]]), torch.ones(2, 1)) for e in range(8)]


@pytest.fixture(scope="module")
def right(model):
    """What each routing gives, alone."""
    outputs = []
    for routing in ROUTINGS:
        with moe_lora.route(model, routing):
            outputs.append(model(x))
    assert len({output.sum().item() for output in outputs}) == len(ROUTINGS)
    return outputs


def assert_unrouted(model):
    with pytest.raises(RuntimeError, match="needs a routing"):
        model(x)
    assert not slot._GENERATORS


async def request(model, e, rounds):
    outputs = []
    with moe_lora.route(model, ROUTINGS[e]):
        for _ in range(rounds):
            await asyncio.sleep(0)
            outputs.append(model(x))
            async with asyncio.timeout(10):
                with moe_lora.route(model, ROUTINGS[(e + 1) % 8]):
                    await asyncio.sleep(0)
                    outputs.append(model(x))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="needs a routing"):
        model(x)
    return outputs


@pytest.mark.parametrize("how", ["eager", "torch.compile", "model.compile"])
def test_interleaved_tasks_get_their_own_routing(model, right, how):
    called = torch.compile(model, fullgraph=True, backend="eager") if how == "torch.compile" else model
    if how == "model.compile":
        model.compile(fullgraph=True, backend="eager")

    async def serve():
        return await asyncio.gather(*(request(called, i % 8, 3) for i in range(1000 if how == "eager" else 40)))

    try:
        answers = asyncio.run(serve())
    finally:
        model._compiled_call_impl = None
    for i, outputs in enumerate(answers):
        for n, output in enumerate(outputs):
            assert torch.equal(output, right[(i + n % 2) % 8])
    assert_unrouted(model)


def test_task_sees_the_routing_that_it_was_started_in(model, right):
    async def child():
        await asyncio.sleep(0)
        return model(x)

    async def parent(e):
        with moe_lora.route(model, ROUTINGS[e]):
            return await asyncio.gather(child(), asyncio.to_thread(model, x))

    async def serve():
        return await asyncio.gather(*(parent(e) for e in range(8)))

    for e, outputs in enumerate(asyncio.run(serve())):
        assert all(torch.equal(output, right[e]) for output in outputs)


def stream(model, e, rounds=3):
    with moe_lora.route(model, ROUTINGS[e]):
        for _ in range(rounds):
            yield model(x)


def test_interleaved_generators_get_their_own_routing(model, right):
    streams = [stream(model, e) for e in range(4)]
    for _ in range(3):
        for e, one in enumerate(streams):
            assert torch.equal(next(one), right[e])
            with pytest.raises(RuntimeError, match="needs a routing"):
                model(x)
            with moe_lora.route(model, ROUTINGS[7]):  # the caller's own does not go in
                assert torch.equal(model(x), right[7])
    with moe_lora.route(model, ROUTINGS[6]):
        one = stream(model, 5)
        assert torch.equal(next(one), right[5])
        assert torch.equal(model(x), right[6])
    del one, streams  # suspended ones leave when they are dropped
    assert_unrouted(model)


def test_interleaved_async_generators_get_their_own_routing(model, right):
    async def streamed(e):
        with moe_lora.route(model, ROUTINGS[e]):
            for _ in range(3):
                await asyncio.sleep(0)
                yield model(x)

    async def serve():
        streams = [streamed(e) for e in range(4)]
        for _ in range(3):
            for e, one in enumerate(streams):
                assert torch.equal(await anext(one), right[e])
        for one in streams:
            await one.aclose()

    asyncio.run(serve())
    assert_unrouted(model)


def test_generator_keeps_its_routing_in_whichever_thread_it_runs(model, right):
    streams = [stream(model, e, 6) for e in range(4)]
    with ThreadPoolExecutor(3) as pool:  # as servers iterate over a response
        for _ in range(6):
            for e, output in enumerate(pool.map(next, streams)):
                assert torch.equal(output, right[e])


@contextlib.contextmanager
def own(model, e):
    with moe_lora.route(model, ROUTINGS[e]):
        yield


def test_context_managers_of_a_user_enter_for_their_caller(model, right):
    with own(model, 2):
        assert torch.equal(model(x), right[2])
        with contextlib.ExitStack() as stack:
            stack.enter_context(own(model, 3))
            stack.enter_context(moe_lora.route(model, ROUTINGS[4]))
            assert torch.equal(model(x), right[4])
        assert torch.equal(model(x), right[2])
    assert_unrouted(model)


def test_route_left_in_another_thread_ends_everywhere(model, right):
    stack, seen = contextlib.ExitStack(), []

    def leave():
        with moe_lora.route(model, ROUTINGS[1]):
            stack.close()
            seen.append(model(x))
        with pytest.raises(RuntimeError, match="needs a routing"):
            model(x)
        seen.append("done")

    with moe_lora.route(model, ROUTINGS[0]):
        stack.enter_context(moe_lora.route(model, ROUTINGS[2]))
        assert torch.equal(model(x), right[2])
        thread = threading.Thread(target=leave)
        thread.start()
        thread.join()
        assert torch.equal(seen[0], right[1]) and seen[1] == "done"
        assert torch.equal(model(x), right[0])
    assert_unrouted(model)


def test_routes_left_out_of_order_leave_the_rest(model, right):
    first, second = moe_lora.route(model, ROUTINGS[0]), moe_lora.route(model, ROUTINGS[1])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(model(x), right[1])
    second.__exit__(None, None, None)
    assert_unrouted(model)


def test_thread_does_not_see_the_routing_of_another(model):
    seen = []

    def work():
        with pytest.raises(RuntimeError, match="needs a routing"):
            model(x)
        seen.append(True)

    with moe_lora.route(model, ROUTINGS[0]):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen
