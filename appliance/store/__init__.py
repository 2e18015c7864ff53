"""SQL: tables, migrations, the batched writer and the webhook outbox."""
