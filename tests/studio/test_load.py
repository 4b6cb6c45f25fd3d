"""The load test of the studio, shortened."""

from pathlib import Path

from ctf.studio import load


def test_concurrent_clients_get_the_responses_to_their_requests(run: Path) -> None:
    report = load.measure(str(run), clients=40, seconds=1, alone=0.3)
    assert report.mismatches == 0
    assert report.statuses.keys() == {200} and report.statuses.total() >= 40
    before, peak = report.memory_before, report.memory_peak
    assert before > 0 or not Path("/proc/self/status").exists()
    assert peak - before < 200 * 2**20
