-- Claim decisions that were chosen for an audit: whoever claims them has them alone while the lease lasts.
--
-- KEYS[1]  the waiting decisions: sorted set of ids by the end of their lease, ms; 0 for those that nobody has claimed
-- KEYS[2]  the price of this hour's audits
-- ARGV[1]  prefix of the run's keys, with the hash tag: the keys built from it live on the node of KEYS
-- ARGV[2]  how many to claim at most
-- ARGV[3]  length of the lease, ms
-- ARGV[4]  how many may wait; the oldest ones beyond are dropped
-- ARGV[5]  the budget of an hour, or "" for none
--
-- Returns {waiting, dropped, id, task, id, task, …}. Ids of one score are in the order of their time.

local prefix, dropped = ARGV[1], 0

local beyond = redis.call("ZCARD", KEYS[1]) - tonumber(ARGV[4])
if beyond > 0 then
  for _, id in ipairs(redis.call("ZRANGE", KEYS[1], 0, math.min(beyond, 1000) - 1)) do
    redis.call("DEL", prefix .. "t:" .. id)
    redis.call("ZREM", KEYS[1], id)
    dropped = dropped + 1
  end
end

local claimed = {}
if ARGV[5] == "" or tonumber(redis.call("GET", KEYS[2]) or "0") < tonumber(ARGV[5]) then
  local clock = redis.call("TIME")
  local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
  local free = redis.call("ZRANGEBYSCORE", KEYS[1], "-inf", string.format("%.0f", now), "LIMIT", 0, ARGV[2])
  for _, id in ipairs(free) do
    local task = redis.call("GET", prefix .. "t:" .. id)
    if task then
      redis.call("ZADD", KEYS[1], "XX", string.format("%.0f", now + tonumber(ARGV[3])), id)
      claimed[#claimed + 1] = id
      claimed[#claimed + 1] = task
    else
      redis.call("ZREM", KEYS[1], id)
      dropped = dropped + 1
    end
  end
end

local out = {redis.call("ZCARD", KEYS[1]), dropped}
for _, part in ipairs(claimed) do
  out[#out + 1] = part
end
return out
