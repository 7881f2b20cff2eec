"""A rolling change under load: a new version comes, the traffic moves, the old one ends, and nothing is lost.

The order is a cluster's: first the weights move, then there is a pause, then SIGTERM. In Knative mode the pause is the
queue-proxy's drain, in Standard mode the preStop hook's sleep (15 s, manifests/components/standard). Here it is 1 s:
Envoy has moved the weights when it begins, and in a cluster it covers the time that the news takes to every proxy.
Nothing between client and server sends a request twice.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest

from tests.canary.cluster import HEALTHY, Cluster
from tests.canary.load import Load, Question, told

RATE = 50.0  # requests per second

# Seconds that any answer may take, and that a version told to end has for what it still runs: the machine may be busy.
PATIENCE_S = 150


@pytest.mark.timeout(400)
def test_a_rolling_change_loses_no_request(tmp_path: Path) -> None:
    # A queue without a limit, since this is about losing requests and not about refusing them.
    version = [*HEALTHY, "--grace-period-s", str(PATIENCE_S), "--queue-limit", "10000"]
    with Cluster(tmp_path, {"gpt2:1": version, "gpt2:2": version}, drain_s=1, timeout_s=PATIENCE_S) as cluster:
        cluster.serve("gpt2:1")
        old = cluster.revision(1)
        with Load(cluster.envoy.url, RATE, timeout_s=PATIENCE_S) as load:
            time.sleep(2)
            cluster.apply("gpt2:2", 50)
            cluster.wait_until(lambda: cluster.share(2) == 50, "the new version has half of the traffic")
            time.sleep(2)
            for number in range(8):  # long generations; half of them keep the old version busy for seconds
                load.also(Question("O", tokens=200, seed=number, samples=16))
            time.sleep(0.5)
            cluster.apply("gpt2:2", None)
            cluster.wait_until(lambda: old.stopped_at, "the old version is told to end")
            cluster.wait_until(lambda: not old.running, "the old version has ended", PATIENCE_S)
            time.sleep(2)
        stopped_s = old.stopped_at
        assert stopped_s is not None
        in_flight = [each for each in load.outcomes if each.revision == old.name and each.answered_s > stopped_s]
        late = [each for each in in_flight if each.sent_s > stopped_s]
        print(f"{load.sent} requests, {len(in_flight)} in flight at SIGTERM, {told(load.outcomes)}")
        assert old.child.exit_code == 0, old.child.log.read_text()
    assert len(load.outcomes) == load.sent
    assert all(each.good for each in load.outcomes), told(load.outcomes)
    assert in_flight, "the old version had nothing left to do when it was told to end: the test shows nothing"
    assert not late, "the old version was given requests after it was told to end"
    # Every request went to one version, once: Envoy tells how each ended, "-" being as it should.
    ends = Counter((each["status"], each["flags"]) for each in cluster.envoy.access_log())
    assert ends == {(200, "-"): load.sent}
