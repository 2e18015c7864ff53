#!/bin/sh
# Run once by the PostgreSQL image on an empty data folder: the role that Grafana reads with.
set -eu
psql -v ON_ERROR_STOP=1 -v password="$GRAFANA_SQL_PASSWORD" --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" <<'SQL'
CREATE ROLE grafana LOGIN PASSWORD :'password';
GRANT pg_read_all_data TO grafana;
ALTER ROLE grafana SET default_transaction_read_only = on;
ALTER ROLE grafana SET statement_timeout = '30s';
SQL
