-- Take one decision out of the waiting audits, with its event, exactly once.
--
-- KEYS[1]  the run's log (stream)
-- KEYS[2]  the run's identity
-- KEYS[3]  the waiting decisions
-- KEYS[4]  the price of this hour's audits
-- KEYS[5]  the newest audits: sorted set of ids by the time of their verdict, ms
-- ARGV[1]  prefix of the run's keys, with the hash tag: the keys built from it live on the node of KEYS
-- ARGV[2]  the decision id
-- ARGV[3]  payload of the decision, any bytes
-- ARGV[4]  value of the event, any bytes; "" for no event
-- ARGV[5]  the identity that the caller holds the run by
-- ARGV[6]  what the audit cost
-- ARGV[7]  what people are shown, any bytes; "" for nothing
-- ARGV[8]  how many of the newest audits are kept
-- ARGV[9]  number of responses
--
-- Returns {status, event id}, shorter where there is none. Status `duplicate`: the decision does not wait any more.
-- Status `lost`: the run has another identity, or none.

local prefix, id = ARGV[1], ARGV[2]

if redis.call("GET", KEYS[2]) ~= ARGV[5] then
  return {"lost"}
end
if not redis.call("ZSCORE", KEYS[3], id) then
  return {"duplicate"}
end

-- The append comes first: a refusal here leaves nothing behind. Feedback that came before goes into the same event; that
-- which comes later finds the payload. A marker is "<event id> <value>".
local event_id
if ARGV[4] ~= "" then
  local value, marker = ARGV[4], redis.call("GET", prefix .. "f:" .. id)
  if marker then
    value = value .. "\n" .. string.sub(marker, string.find(marker, " ", 1, true) + 1)
  end
  event_id = redis.call("XADD", KEYS[1], "*", "d", id, "p", ARGV[3], "s", value)
  redis.call("SET", prefix .. "d:" .. id, ARGV[9] .. " " .. ARGV[3], "XX", "KEEPTTL")
end
redis.call("ZREM", KEYS[3], id)
redis.call("DEL", prefix .. "t:" .. id)
redis.call("INCRBYFLOAT", KEYS[4], ARGV[6])
if redis.call("PTTL", KEYS[4]) < 0 then
  redis.call("PEXPIRE", KEYS[4], 3600000)
end
if not event_id then
  return {"applied"}
end
if ARGV[7] ~= "" then
  local clock = redis.call("TIME")
  redis.call("ZADD", KEYS[5], string.format("%.0f", clock[1] * 1000 + math.floor(clock[2] / 1000)), id)
  redis.call("HSET", prefix .. "b:" .. id, "p", ARGV[3], "t", ARGV[7])
  local beyond = redis.call("ZCARD", KEYS[5]) - tonumber(ARGV[8])
  if beyond > 0 then
    for _, old in ipairs(redis.call("ZRANGE", KEYS[5], 0, beyond - 1)) do
      redis.call("DEL", prefix .. "b:" .. old)
      redis.call("ZREM", KEYS[5], old)
    end
  end
end
return {"applied", event_id}
