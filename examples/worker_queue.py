"""A queue of jobs in the background, without a broker: priorities, results in SQLite, restarts.

    pip install .
    python examples/worker_queue.py jobs.db

Interrupt it, even with `kill -9`, and run it again: it goes on with the jobs that have no result.
"""

import asyncio
import sqlite3
import sys

import mtpbatch

MODEL = None  # the path of a GGUF file; None is the demo model in the package
N_SEQ = 4


class Jobs:
    """Jobs that survive the process. A job is done when its row has a result: there is no other
    state that a crash could leave wrong. What a crash interrupts is generated again."""

    def __init__(self, path: str) -> None:
        self.db = sqlite3.connect(path, isolation_level=None)  # each statement is a transaction
        # WAL commits by one write to a log. That is quick enough for an event loop; a database
        # that is not belongs behind `anyio.to_thread.run_sync`.
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA busy_timeout = 5000")  # others may be reading
        self.db.execute(
            "CREATE TABLE IF NOT EXISTS jobs (id INTEGER PRIMARY KEY, priority INTEGER NOT NULL,"
            " prompt TEXT NOT NULL, text TEXT, result TEXT)"
        )
        # The database remembers, the queue orders: lowest priority first, then the oldest.
        self.queue = asyncio.PriorityQueue[tuple[int, int, str]]()
        for job in self.db.execute("SELECT priority, id, prompt FROM jobs WHERE result IS NULL"):
            self.queue.put_nowait(job)

    def add(self, prompt: str, priority: int = 0) -> int:
        """Add a job, from -100 (first) to 100. It will be done, once this has returned."""
        row = self.db.execute(
            "INSERT INTO jobs (priority, prompt) VALUES (?, ?) RETURNING id", (priority, prompt)
        )
        [job_id] = row.fetchone()
        self.queue.put_nowait((priority, job_id, prompt))
        return int(job_id)

    def count(self) -> int:
        """How many there are, with results or without."""
        [count] = self.db.execute("SELECT count(*) FROM jobs").fetchone()
        return int(count)

    async def work(self, engine: mtpbatch.Engine) -> None:
        """Do jobs, until cancelled."""
        while True:
            priority, job_id, prompt = await self.queue.get()
            try:
                done = await engine.generate(
                    prompt, priority=priority, max_tokens=80, temperature=0.7, seed=job_id
                )
                text, result = done.text, str(done.finish_reason)
            except (mtpbatch.InvalidRequestError, mtpbatch.NativeError) as error:
                # This job's own fault: its error is its result. Any other error, such as that of a
                # dead engine, ends the worker and leaves the job for the next start.
                text, result = "", f"error: {error}"
            if result != "abort":  # the engine was closed meanwhile: the job is for the next start
                self.db.execute(
                    "UPDATE jobs SET text = ?, result = ? WHERE id = ?", (text, result, job_id)
                )
                print(f"job {job_id}, priority {priority}: {result}", flush=True)
            self.queue.task_done()


async def main(path: str) -> None:
    jobs = Jobs(path)
    if not jobs.count():
        for i in range(12):
            jobs.add(f"{i} And it came to pass", priority=i % 3)
    async with mtpbatch.Engine.open(MODEL, n_seq=N_SEQ) as engine, asyncio.TaskGroup() as tasks:
        # Two more than run at once, so that the engine always has a next one. More would only take
        # jobs from the queue, where one that is urgent can still overtake them.
        workers = [tasks.create_task(jobs.work(engine)) for _ in range(N_SEQ + 2)]
        await jobs.queue.join()
        for worker in workers:
            worker.cancel()
    print(f"{jobs.count()} jobs have their results in {path}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "jobs.db"))
