#!/usr/bin/env bash
# Posts $REVIEW/comment.md to the pull request it is about, or updates the comment that is there. What it reads was
# written by a job that ran the change's own code, so nothing in it is believed: the number must be one, and of a pull
# request whose head is the commit that the reviewed run was started for.
set -euo pipefail

fail() { echo "shardlab comment: $*" >&2; exit 1; }

number=$(head -c 20 "$REVIEW/pull_request")
[[ $number =~ ^[0-9]+$ ]] || fail "the review names no pull request; nothing was posted"
[ -s "$REVIEW/comment.md" ] || fail "the review has no comment.md; see the log of the review job"
[ "$(wc -c <"$REVIEW/comment.md")" -le 65536 ] || fail "comment.md is longer than a comment may be; nothing was posted"
head=$(gh api "repos/$REPOSITORY/pulls/$number" --jq .head.sha)
[ "$head" = "$HEAD" ] || fail "pull request $number is at $head, and the review is of $HEAD; nothing was posted"

marker='<!-- shardlab review -->'
before=$(gh api --paginate "repos/$REPOSITORY/issues/$number/comments" \
  --jq ".[] | select(.user.type == \"Bot\" and (.body | startswith(\"$marker\"))) | .id" | sed -n 1p)
if [ -n "$before" ]; then
  gh api --method PATCH "repos/$REPOSITORY/issues/comments/$before" -F body=@"$REVIEW/comment.md" >/dev/null
else
  gh api --method POST "repos/$REPOSITORY/issues/$number/comments" -F body=@"$REVIEW/comment.md" >/dev/null
fi
