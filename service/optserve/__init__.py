"""Optimization as a service. The folders stand in the order in which a step passes through them.

A worker posts gradients to ``/v1/sessions/{id}/step``:

1.  ``api/``       bytes in, bytes out. Finds the session, streams the body into a gradient buffer
                   that the session leases out, and turns the reply into JSON or safetensors
                   bytes. The only importer of fastapi.
2.  ``sessions/``  who may step, and in what order. The registry knows the sessions; a session
                   checks worker, epoch and seq, waits for its turn, has the numbers changed,
                   has one event committed and only then publishes the new params. A session that
                   is not in memory is read back by the same code.
3.  ``optim/``     numbers only: the catalogue of optimizers and schedules, and one update in its
                   fixed order of arithmetic. The only importer of torch.
4.  ``store/``     what must outlive a failure: the journal of events, their payloads, snapshots,
                   in SQLite or PostgreSQL and in files. Many sessions share one commit.

Imports point one way, ``api -> sessions -> {optim, store}``; all may use ``optserve_client.wire``
(named arrays as bytes) and ``optserve_client.errors`` (the one error tree). ``settings.py`` says
what can be set, ``cli.py`` and ``commands/`` read the command line and ``server.py`` runs the
process.
"""

__version__ = "0.1.0"
