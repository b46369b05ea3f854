#!/usr/bin/env bash
# A training run with nothing but curl: minimises w² from w = 4.  examples/curl.sh [URL]
set -euo pipefail
url=${1:-http://127.0.0.1:8000}
json='Content-Type: application/json'
id=curl-$$

curl -sf -X PUT "$url/v1/sessions/$id" -H "$json" -o /dev/null \
  -d '{"optimizer": {"name": "Adam", "lr": 0.5}, "params": {"w": [4.0]},
       "scheduler": {"name": "ExponentialLR", "gamma": 0.9, "advance": "step"}}'
w=4.0
for step in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
  reply=$(curl -sf "$url/v1/sessions/$id/step" -H "$json" \
    -d "{\"grads\": {\"w\": [$(awk "BEGIN { printf \"%.9g\", 2 * $w }")]}, \"worker\": \"shell\", \"seq\": $step}")
  w=$(printf '%s' "$reply" | sed 's/.*"w":\[\([^]]*\)\].*/\1/')
done
echo "w = $w after 20 steps"
curl -sf "$url/v1/sessions/$id/history" -H 'Accept: text/csv'
curl -sf -X DELETE "$url/v1/sessions/$id" -o /dev/null
