-- Append an act of an operator to a run's log, and to the list of its acts, which is never trimmed.
--
-- KEYS[1]  the run's log (stream)
-- KEYS[2]  the run's acts (stream): the same entries under the same ids
-- KEYS[3]  the run's identity
-- ARGV[1]  the identity that the caller holds the run by
-- ARGV[2]  how many acts the caller has seen, or "" when it does not matter
-- ARGV[3]  the act's name
-- ARGV[4]  payload, any bytes
-- ARGV[5]  value, any bytes
--
-- Returns {status, event id}, shorter where there is none. Status `conflict`: there are other acts than the caller has
-- seen. Status `lost`: the run has another identity, or none.

if redis.call("GET", KEYS[3]) ~= ARGV[1] then
  return {"lost"}
end
if ARGV[2] ~= "" and redis.call("XLEN", KEYS[2]) ~= tonumber(ARGV[2]) then
  return {"conflict"}
end
local event_id = redis.call("XADD", KEYS[1], "*", "d", ARGV[3], "p", ARGV[4], "s", ARGV[5])
redis.call("XADD", KEYS[2], event_id, "d", ARGV[3], "p", ARGV[4], "s", ARGV[5])
return {"applied", event_id}
