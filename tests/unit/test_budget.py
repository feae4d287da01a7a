"""How much of a cluster each kind of work takes, on clusters made up."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protopnet.budget import Cluster, Group, Node, pass_plan, training_plan
from protopnet.cli import parse
from protopnet.cluster import check_shared
from protopnet.config import ComputeSettings, RunSettings
from protopnet.errors import UserError

HEAD = Node(0)
GPU = Node(8, 1)
BIG = Node(48, 4)
CPU = Node(16, kinds=frozenset({"cpu"}))
ON_DEMAND = Node(8, 1, frozenset({"on_demand"}))
SPOT = Node(8, 1, frozenset({"spot"}))
LAPTOP = Cluster((Node(2),), spare_cpus=2)
GROUPS = (Group(Node(0), 0), Group(ON_DEMAND, 8), Group(SPOT, 16), Group(CPU, 4))  # cluster.yaml


def compute(**values: object) -> ComputeSettings:
    return ComputeSettings.model_validate(values)


class TestSettings:
    @pytest.mark.parametrize(
        ("text", "workers"), [("3", 3), ("2,8", (2, 8)), ("[2, 8]", (2, 8)), ("4,4", (4, 4)), ("null", None)]
    )
    def test_workers_are_a_number_or_the_fewest_and_the_most(self, text: str, workers: object) -> None:
        assert parse(RunSettings, ["--compute.workers", text]).compute.workers == workers

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("workers", "8,2", "compute.workers: 8,2 is not valid; expected the fewest first, then the most: 2,8"),
            ("workers", "0", "compute.workers: 0 is not valid; training needs at least 1 worker"),
            ("workers", "0,4", "compute.workers: 0 is not valid; training needs at least 1 worker"),
            ("workers", "many", "compute.workers: many is not valid; expected a whole number or 2 whole numbers"),
            ("gpu_share", "1.5", "compute.gpu_share: 1.5 is not valid; expected a number, above 0, at most 1"),
        ],
    )
    def test_what_is_wrong_is_said_in_a_sentence(self, name: str, text: str, message: str) -> None:
        with pytest.raises(UserError) as error:
            parse(RunSettings, [f"--compute.{name}", text])
        assert str(error.value).startswith(message)


class TestTraining:
    def test_a_laptop_trains_with_one_worker_and_all_cores(self) -> None:
        plan = training_plan(compute(), LAPTOP)
        assert (plan.workers, plan.threads, plan.gpu) == (1, 2, False)
        assert plan.resources_per_worker == {"CPU": 2.0}

    def test_one_worker_a_gpu_and_none_on_the_head_or_on_nodes_without(self) -> None:
        plan = training_plan(compute(), Cluster((HEAD, GPU, BIG, CPU)))
        assert (plan.workers, plan.gpu, plan.threads) == (5, True, 8)
        assert plan.resources_per_worker == {"CPU": 8.0, "GPU": 1.0}

    def test_a_worker_never_has_more_threads_than_its_node(self) -> None:
        assert training_plan(compute(), Cluster((HEAD, Node(4), Node(4), Node(4)))).threads == 4
        assert training_plan(compute(workers=3), Cluster((Node(4), Node(4)))).threads == 2

    def test_only_nodes_of_the_kind_asked_for(self) -> None:
        plan = training_plan(compute(nodes="on_demand"), Cluster((HEAD, ON_DEMAND, SPOT, SPOT)))
        assert plan.workers == 1
        assert plan.resources_per_worker == {"CPU": 8.0, "GPU": 1.0, "on_demand": 0.001}

    def test_a_cluster_that_has_scaled_down_to_its_head_is_asked_to_grow(self) -> None:
        asleep = Cluster((HEAD,), GROUPS)
        assert training_plan(compute(nodes="on_demand"), asleep).workers == 1
        plan = training_plan(compute(nodes="on_demand", workers=8), asleep)
        assert (plan.workers, plan.gpu, plan.threads) == (8, True, 8)
        with pytest.raises(UserError, match=r"compute.workers is 9, but .*on_demand nodes have 8 GPUs"):
            training_plan(compute(nodes="on_demand", workers=9), asleep)

    def test_elastic_workers_need_only_the_fewest(self) -> None:
        plan = training_plan(compute(workers=(2, 16)), Cluster((HEAD, GPU, GPU)))
        assert plan.num_workers == (2, 16)
        with pytest.raises(UserError, match="compute.workers is 3 at least, but the cluster has 2 GPUs"):
            training_plan(compute(workers=(3, 16)), Cluster((HEAD, GPU, GPU)))

    def test_as_many_as_at_least_is_a_fixed_number(self) -> None:
        assert training_plan(compute(workers=(2, 2)), Cluster((GPU, GPU))).num_workers == 2
        assert training_plan(compute(workers=2), Cluster((GPU, GPU))).num_workers == 2

    @pytest.mark.parametrize(
        ("asked", "cluster", "message"),
        [
            ({"workers": 64}, LAPTOP, "compute.workers is 64, but the cluster has 2 CPUs; .* at most 2"),
            ({"gpu": True}, LAPTOP, "compute.gpu is true, but the cluster has no GPU"),
            ({"nodes": "fast"}, Cluster((SPOT,), GROUPS), "compute.nodes is fast.* one of cpu, on_demand, spot"),
            ({"nodes": "fast"}, LAPTOP, "compute.nodes is fast.* leave it out"),
            ({}, Cluster((HEAD,)), "no node of the cluster offers a CPU"),
            ({"gpu_share": 0.5, "workers": 2}, Cluster((GPU,)), "compute.gpu_share is 0.5, but two training workers"),
        ],
    )
    def test_what_can_t_be_is_refused_in_a_sentence(self, asked: dict, cluster: Cluster, message: str) -> None:
        with pytest.raises(UserError, match=message):
            training_plan(compute(**asked), cluster)


class TestPasses:
    def test_one_actor_a_gpu_of_the_whole_cluster(self) -> None:
        plan = pass_plan(compute(), Cluster((HEAD, GPU, BIG, CPU)))
        assert (plan.actors, plan.gpus, plan.cpus, plan.threads) == (5, 1.0, 1.0, 8)

    def test_several_actors_share_a_gpu(self) -> None:
        plan = pass_plan(compute(gpu_share=0.5), Cluster((HEAD, GPU, GPU)))
        assert (plan.actors, plan.gpus, plan.threads) == (4, 0.5, 4)
        assert pass_plan(compute(pass_workers=3), Cluster((GPU, GPU))).gpus == 0.5  # 2/3 would leave the third out

    def test_one_actor_a_node_where_there_are_no_gpus(self) -> None:
        plan = pass_plan(compute(), Cluster((HEAD, Node(4), Node(16))))
        assert (plan.actors, plan.gpus, plan.threads) == (2, 0.0, 4)

    def test_a_pass_on_cpus_may_use_the_nodes_with_gpus_too(self) -> None:
        assert pass_plan(compute(gpu=False), Cluster((HEAD, GPU, CPU))).actors == 2
        assert pass_plan(compute(gpu=False, nodes="cpu"), Cluster((HEAD, GPU, CPU))).actors == 1

    def test_where_everything_is_still_to_come_one_actor_asks_for_it(self) -> None:
        plan = pass_plan(compute(nodes="spot"), Cluster((HEAD,), GROUPS))
        assert (plan.actors, plan.gpus, plan.cpus, plan.nodes) == (1, 1.0, 1.0, "spot")
        assert pass_plan(compute(nodes="spot", pass_workers=16), Cluster((HEAD,), GROUPS)).actors == 16

    @settings(max_examples=300, deadline=None)
    @given(
        nodes=st.lists(
            st.builds(Node, st.integers(0, 32).map(float), st.integers(0, 8).map(float)), min_size=1, max_size=6
        ),
        actors=st.none() | st.integers(1, 20),
        share=st.sampled_from([1.0, 0.5, 0.3, 0.25]),
    )
    def test_actors_fit_and_leave_a_cpu_for_the_tasks_between_them(
        self, nodes: list[Node], actors: int | None, share: float
    ) -> None:
        cluster = Cluster(tuple(nodes))
        if not any(node.cpus >= 1 for node in nodes):
            return
        plan = pass_plan(compute(pass_workers=actors, gpu_share=share), cluster)
        total = sum(node.cpus for node in nodes)
        assert plan.actors * plan.cpus <= max(total - 1, 0.1 * plan.actors) + 1e-9
        assert plan.threads <= max(node.cpus for node in nodes)
        if plan.gpus:
            usable = [node for node in nodes if node.cpus >= 1]
            assert sum(node.gpus * int(1 / plan.gpus + 1e-9) for node in usable) >= plan.actors


class TestSharedStorage:
    def test_what_only_this_machine_sees_is_refused_where_others_would_work_with_it(self) -> None:
        with pytest.raises(UserError, match=r"storage is runs, .* \(2\) .* s3://…, or compute.shared_storage true"):
            check_shared({"storage": "runs"}, compute(), 2)

    @pytest.mark.parametrize(
        ("path", "shared", "others"), [("s3://bucket/runs", False, 2), ("/nfs/runs", True, 2), ("runs", False, 0)]
    )
    def test_what_all_see_is_not(self, path: str, shared: bool, others: int) -> None:
        check_shared({"storage": path}, compute(shared_storage=shared), others)
