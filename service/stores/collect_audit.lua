-- Add one part to a waiting audit that is made of several decisions, which come one by one.
--
-- KEYS[1]  the waiting decisions: sorted set of ids by the time from which they may be claimed, ms
-- ARGV[1]  prefix of the run's keys, with the hash tag: the keys built from it live on the node of KEYS
-- ARGV[2]  the audit's id
-- ARGV[3]  the part, any bytes
-- ARGV[4]  how many parts there may be; later ones are left out
-- ARGV[5]  how long after the first part it may be claimed, ms
-- ARGV[6]  how long the audit is kept, ms
--
-- Returns 1 if the part was added, 0 if it came too late. The count outlives the audit, so that a late part does not
-- begin it again.

local prefix, id = ARGV[1], ARGV[2]
local parts = redis.call("INCR", prefix .. "g:" .. id)
redis.call("PEXPIRE", prefix .. "g:" .. id, ARGV[6])
if parts == 1 then
  local clock = redis.call("TIME")
  local due = clock[1] * 1000 + math.floor(clock[2] / 1000) + tonumber(ARGV[5])
  redis.call("ZADD", KEYS[1], string.format("%.0f", due), id)
elseif parts > tonumber(ARGV[4]) or not redis.call("ZSCORE", KEYS[1], id) then
  return 0
end
redis.call("APPEND", prefix .. "t:" .. id, ARGV[3])
redis.call("PEXPIRE", prefix .. "t:" .. id, ARGV[6])
return 1
