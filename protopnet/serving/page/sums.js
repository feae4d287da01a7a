/* Figures as people read them: rounded, and still adding up for whoever checks them with a calculator.

   Similarity and connection are shown to three decimals, and points are the product of what is shown. The total is the
   logit to two decimals. What rounding left over goes into the last line, which no reader can recompute. All sums are of
   whole hundredths, because 0.1 + 0.2 isn't 0.3 here either. */

const thousandths = (value) => Math.round(value * 1000);
const hundredths = (value) => Math.round(value * 100);

/** The table below a class in figures that add up: rows, the rest in one or two lines, the total; in hundredths. */
export function account(entry, ownPrototypes) {
  const rows = entry.evidence.map((item) => {
    const similarity = thousandths(item.similarity);
    const connection = thousandths(item.connection);
    return { similarity, connection, points: Math.round((similarity * connection) / 10_000) };
  });
  const listed = rows.reduce((sum, row) => sum + row.points, 0);
  const total = entry.remainder.prototypes ? hundredths(entry.logit) : listed;
  const rest = total - listed;
  const own = entry.evidence.filter((item) => item.class === entry.class);
  const ownCount = ownPrototypes - own.length;
  const otherCount = entry.remainder.prototypes - ownCount;
  const ownRest = hundredths(entry.own_points - own.reduce((sum, item) => sum + item.points, 0));
  const whole = otherCount === 0 ? "own" : ownCount === 0 ? "other" : null;
  return {
    rows,
    own: { count: ownCount, points: whole === "own" ? rest : whole === "other" ? 0 : ownRest },
    other: { count: otherCount, points: whole === "other" ? rest : whole === "own" ? 0 : rest - ownRest },
    total,
  };
}

/** 1234 hundredths is 12.34; with a true minus sign. */
export const points = (value) => signed(value, 100, 2);
export const precise = (value) => signed(value, 1000, 3);

/** "4.21 points more" or "fewer": of the totals as they are shown. */
export function difference(logit, other) {
  const value = hundredths(logit) - hundredths(other);
  return `${points(Math.abs(value))} points ${value < 0 ? "fewer" : "more"}`;
}

/** A probability in per cent, never rounded to certainty or impossibility. */
export function percent(probability) {
  if (probability >= 0.9995) return "> 99.9 %";
  if (probability < 0.0005) return "< 0.1 %";
  return `${(100 * probability).toFixed(1)} %`;
}

function signed(value, unit, decimals) {
  return (value < 0 ? "−" : "") + (Math.abs(value) / unit).toFixed(decimals);
}
