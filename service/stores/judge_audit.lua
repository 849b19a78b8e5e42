-- Append what a person says of an audited decision, exactly once.
--
-- KEYS[1]  the run's log (stream)
-- KEYS[2]  the run's identity
-- ARGV[1]  prefix of the run's keys, with the hash tag: the keys built from it live on the node of KEYS
-- ARGV[2]  the decision id
-- ARGV[3]  payload of the decision, any bytes
-- ARGV[4]  value of the event, any bytes
-- ARGV[5]  the identity that the caller holds the run by
-- ARGV[6]  how long the marker lives, ms
-- ARGV[7]  number of responses
--
-- Returns {status, event id, standing value}, shorter where there is nothing to say.

local prefix, id = ARGV[1], ARGV[2]

if redis.call("GET", KEYS[2]) ~= ARGV[5] then
  return {"lost"}
end

-- Markers are "<event id> <value>": of the person's verdict, and of the trainer's feedback.
local marker_key = prefix .. "h:" .. id
local marker = redis.call("GET", marker_key)
if marker then
  local space = string.find(marker, " ", 1, true)
  local event_id, standing = string.sub(marker, 1, space - 1), string.sub(marker, space + 1)
  if standing == ARGV[4] then
    return {"duplicate", event_id}
  end
  return {"conflict", event_id, standing}
end

local value, feedback = ARGV[4], redis.call("GET", prefix .. "f:" .. id)
if feedback then
  value = value .. "\n" .. string.sub(feedback, string.find(feedback, " ", 1, true) + 1)
end
local event_id = redis.call("XADD", KEYS[1], "*", "d", id, "p", ARGV[3], "s", value)
redis.call("SET", marker_key, event_id .. " " .. ARGV[4], "PX", ARGV[6])
redis.call("SET", prefix .. "d:" .. id, ARGV[7] .. " " .. ARGV[3], "XX", "KEEPTTL")
return {"applied", event_id}
