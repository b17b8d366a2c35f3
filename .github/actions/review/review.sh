#!/usr/bin/env bash
# Writes what a pull request changes into $REVIEW: comment.md, report.html, status (the exit code that the job ends
# with), and pull_request (the number). Needs shardlab on PATH and a checkout that has both commits. Holds no token.
set -euo pipefail

mkdir -p "$REVIEW"
read -ra plans <<<"$PLANS"
machines=()
[ -z "$MACHINES" ] || machines=(--on "$MACHINES")
printf '%s\n' "${PULL_REQUEST:-}" >"$REVIEW/pull_request"
status=0

# says TITLE FILE: the mistakes that a command printed, folded into the comment.
says() { printf '\n**%s**\n\n```\n%s\n```\n' "$1" "$(head -c 4000 "$2" | tr -d '`')"; }

{
  echo '<!-- shardlab review -->'
  if shardlab diff "$BASE...$HEAD" "${machines[@]}" --markdown -- "${plans[@]}" 2>"$REVIEW/log"; then
    # Every program is in the cache by now.
    shardlab diff "$BASE...$HEAD" "${machines[@]}" --html "$REVIEW/report.html" -- "${plans[@]}" >/dev/null
  else
    status=2
    says 'The change could not be reviewed:' "$REVIEW/log"
  fi
  cat "$REVIEW/log" >&2
} >"$REVIEW/comment.md"

if [ "$CHECK" = true ]; then
  files=()
  for plan in "${plans[@]}"; do
    if [ -d "$plan" ]; then files+=("$plan"/*.toml); else files+=("$plan"); fi
  done
  kept=()
  for file in "${files[@]}"; do [ "$(basename "$file")" = budgets.toml ] || kept+=("$file"); done
  code=0
  shardlab check "${kept[@]}" --markdown >"$REVIEW/check.md" 2>"$REVIEW/log" || code=$?
  cat "$REVIEW/log" >&2
  case $code in
    0) ;;
    1) printf '\n**Worse than a baseline, or above a budget:**\n\n%s\n' "$(cat "$REVIEW/check.md")" ;;
    *) says 'Baselines and budgets could not be checked:' "$REVIEW/log" ;;
  esac >>"$REVIEW/comment.md"
  status=$((code > status ? code : status))
fi

echo "$status" >"$REVIEW/status"
[ -z "${GITHUB_STEP_SUMMARY:-}" ] || cat "$REVIEW/comment.md" >>"$GITHUB_STEP_SUMMARY"
