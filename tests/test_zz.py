def test_a(finished_run):
    import subprocess
    print(subprocess.run(f"find {finished_run} -type f; head -3 {finished_run}/metrics.jsonl; tail -3 {finished_run}/metrics.jsonl", shell=True, capture_output=True, text=True).stdout)
